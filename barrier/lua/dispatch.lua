-- Check every rank and append the task, at one instant. Once per step.
-- KEYS: epoch leader tasks events once rank...
-- ARGV: term holder number nonce step attempt after repeatable to seen_n known_n record_ms once_ms log_cap event_cap endpoints payload rule...
-- Replies: DISPATCHED id · ALREADY id · NOT_READY rank... · ABORTED verdict · SUPERSEDED number nonce · FENCED term holder ·
--          UNKNOWN reason
--
-- after: a step that must have been dispatched before, or empty.
-- attempt: 1; more for a step that a rank refused and that the caller dispatches again.
-- repeatable: 1 for a step that may come any number of times (a generation). A short-lived key of its own remembers it, across epochs:
--   ALREADY with the id of an earlier epoch means that the task will not be done again.
-- seen_n: the highest log position that the caller knows of.
-- known_n: the position that this step got when the caller dispatched it before, or 0.
-- endpoints: 1 to copy the endpoints in the present reports into the record; see write_endpoints.
-- rule: see missing_ranks.

local term, holder, number, nonce, step, attempt, after, repeatable, to, seen_n, known_n, record_ms, once_ms, log_cap, event_cap,
  endpoints, payload = unpack(ARGV, 1, 17)
local FIRST_RANK, FIRST_RULE = 6, 18

local world_size, field, needed = #KEYS - FIRST_RANK + 1, 'step:' .. step, after ~= '' and 'step:' .. after or nil
local record, wrong = read_record(KEYS[1], world_size, field, needed)
wrong = wrong or wrong_type({ { KEYS[3], 'stream' }, repeatable == '1' and { KEYS[5], 'string' } or nil })
if wrong then
  return wrong
end
local refusal = fenced(KEYS[2], term, holder)
if refusal then
  return refusal
end
refusal = not_current(record, number, nonce)
if refusal then
  return refusal
end
local roster, unknown = roster_of(record, world_size)
if not roster then
  return unknown
end

local before = record[field]
if repeatable == '1' then
  before = redis.call('GET', KEYS[5])
end
if before then
  local id, attempts = string.match(before, '^(%d+%-%d+):(%d+)$')
  if not id then
    return { 'UNKNOWN', 'the record of step ' .. step .. ' is not readable' }
  end
  if tonumber(attempts) >= tonumber(attempt) then
    return { 'ALREADY', id }
  end
end
if needed and not record[needed] then
  return { 'UNKNOWN', 'step ' .. after .. ' was not dispatched in this epoch' }
end

local missing, applied = missing_ranks(record, roster, FIRST_RANK, FIRST_RULE)
if #missing > 0 then
  return not_ready(missing)
end

-- The position is above everything that anybody has read. So no rank takes a new entry for an old one, or waits beyond the log's end.
local function place(log_n)
  local written = math.max(log_n, tonumber(record.last_n) or 0)
  local newest = math.max(written, applied, tonumber(seen_n))
  -- A step that the store forgot gets its old position again. So a rank that has read it recognises it.
  if not before and tonumber(known_n) > written then
    return tonumber(known_n), written
  end
  return newest + 1, newest
end

local n
local function append(call, log_n)
  local newest
  n, newest = place(log_n)
  return call('XADD', KEYS[3], 'MAXLEN', log_cap, number .. '-' .. whole(n), 'kind', 'task', 'nonce', nonce,
    'prev', whole(newest), 'term', term, 'step', step, 'to', to, 'task', payload)
end

-- A stream refuses an id that is not above every id that it has ever had. So the log's end is read only after a refusal, or if the step may
-- have an old position.
local id
if before or tonumber(known_n) == 0 then
  id = append(redis.pcall, 0)
end
if type(id) ~= 'string' then
  local log_number, log_n = log_end(KEYS[3])
  if log_number > tonumber(number) then
    return { 'UNKNOWN', 'the log has entries of epoch ' .. whole(log_number) }
  end
  id = append(redis.call, log_number == tonumber(number) and log_n or 0)
end
redis.call('PEXPIRE', KEYS[3], record_ms)
if endpoints == '1' then
  write_endpoints(KEYS[1], read_reports(FIRST_RANK))
end
local mark = id .. ':' .. attempt
if repeatable == '1' then
  redis.call('SET', KEYS[5], mark, 'PX', once_ms)
  redis.call('HSET', KEYS[1], 'last_n', whole(n))
else
  redis.call('HSET', KEYS[1], field, mark, 'last_n', whole(n))
end
redis.call('PEXPIRE', KEYS[1], record_ms)
history(KEYS[4], event_cap, record_ms, number .. '-' .. nonce, 'Dispatched', 'step', step, 'id', id, 'to', to, 'attempt', attempt)
return { 'DISPATCHED', id }
