-- Write a lost record back as it was, if all ranks agree on it. So a loaded model survives a flush.
-- KEYS: epoch leader tasks signals events rank...
-- ARGV: term holder number nonce known_number status steps ordinal digest notes record_ms signal_cap event_cap
-- Replies: RESTORED number nonce ordinal · NOT_READY rank... · SUPERSEDED number nonce · FENCED term holder
--
-- Every rank must report exactly this epoch, this status, the same log position (the end of the log), and no higher promise. NOT_READY
-- names the ranks that do not. The number must be one that a planner can have given: see `highest_epoch`.
-- steps: the steps that the status proves to have been dispatched, joined by commas.

local term, holder, number, nonce, known_number, status, steps, ordinal, digest, notes, record_ms, signal_cap, event_cap = unpack(ARGV)
local FIRST_RANK = 6

local wrong = wrong_type({ { KEYS[1], 'hash' }, { KEYS[2], 'hash' }, { KEYS[3], 'stream' } })
if wrong then
  return wrong
end
local refusal = fenced(KEYS[2], term, holder)
if refusal then
  return refusal
end
local record = redis.call('HMGET', KEYS[1], 'number', 'nonce', 'ordinal')
if record[1] then
  if record[1] == number and record[2] == nonce then
    return { 'RESTORED', number, nonce, record[3] }
  end
  return { 'SUPERSEDED', record[1], record[2] or '' }
end

-- If the log goes on to a verdict or to another epoch, this epoch is over.
local log_number, log_n, log_kind = log_end(KEYS[3])
if log_number > tonumber(number) or (log_number == tonumber(number) and log_kind == 'verdict') then
  return { 'SUPERSEDED', whole(log_number), '' }
end

local reports = read_reports(FIRST_RANK)
local world_size = #KEYS - FIRST_RANK + 1
local incarnations, missing, agreed_applied = {}, {}, nil
local given = tonumber(number) <= highest_epoch(log_number, tonumber(known_number))
for rank = 0, world_size - 1 do
  local report = reports[rank + 1]
  local epoch, incarnation, rank_status, applied, floor, rank_digest
  if report then
    epoch, incarnation, rank_status, applied, floor, rank_digest = parse_report(report)
  end
  agreed_applied = agreed_applied or applied
  -- A later entry in the log was dispatched, and nobody has read it yet. The record must not forget it, or it would be sent again.
  local read_all = log_number < tonumber(number) or (applied or 0) >= log_n
  if epoch == number .. '-' .. nonce and rank_status == status and applied == agreed_applied
    and read_all and given and floor == tonumber(number) and (rank_digest == '-' or rank_digest == digest) then
    incarnations[rank + 1] = incarnation
  else
    missing[#missing + 1] = rank
  end
end
if #missing > 0 then
  return not_ready(missing)
end

local attempt = whole(math.max(tonumber(ordinal), 1))
redis.call('HSET', KEYS[1], 'wire', WIRE_VERSION, 'number', number, 'nonce', nonce, 'term', term, 'world_size', tostring(world_size),
  'digest', digest, 'ordinal', attempt, 'opened_ms', whole(server_ms()), 'last_n', whole(agreed_applied), 'notes', notes)
for step in string.gmatch(steps, '[^,]+') do
  redis.call('HSET', KEYS[1], 'step:' .. step, number .. '-' .. whole(agreed_applied) .. ':1')
end
write_roster(KEYS[1], incarnations)
write_endpoints(KEYS[1], reports)
redis.call('PEXPIRE', KEYS[1], record_ms)
hint(KEYS[4], signal_cap, record_ms, 'restored')
history(KEYS[5], event_cap, record_ms, number .. '-' .. nonce, 'Restored', 'status', status,
  'roster', table.concat(incarnations, ','))
return { 'RESTORED', number, nonce, attempt }
