-- Start a new epoch, if every rank has a live report, whatever its status. The incarnations of the reports become the roster.
-- KEYS: epoch leader tasks signals events rank...
-- ARGV: term holder nonce floor ordinal digest notes record_ms log_cap signal_cap event_cap
-- Replies: OPENED number nonce ordinal · NOT_READY rank... · DISAGREE rank digest... · UNCONCLUDED number nonce ·
--          FENCED term holder
--
-- The epoch's number is above every number that the record, the caller, a report or the log knows, and above the store's clock. If a store
-- that went back issues one number twice, the nonce tells the two epochs apart. To repeat the call with one nonce is harmless.
-- A rank that reports a number that no planner can have given counts as missing: see `highest_epoch`.
-- DISAGREE: a rank was configured for another model or world size (its digest is not the caller's).

local term, holder, nonce, floor, ordinal, digest, notes, record_ms, log_cap, signal_cap, event_cap = unpack(ARGV)
local FIRST_RANK = 6
local INEXACT = 9007199254740992 -- 2^53: above it, Lua's numbers skip some

local wrong = wrong_type({ { KEYS[1], 'hash' }, { KEYS[2], 'hash' }, { KEYS[3], 'stream' } })
if wrong then
  return wrong
end
local refusal = fenced(KEYS[2], term, holder)
if refusal then
  return refusal
end
local record = redis.call('HMGET', KEYS[1], 'number', 'nonce', 'verdict', 'ordinal', 'world_size')
if record[1] and record[2] == nonce then
  return { 'OPENED', record[1], nonce, record[4] }
end
-- A record that lacks a field or has no valid number counts as missing: `conclude` could not end it either.
local readable = record[1] and string.match(record[1], '^%d+$') and #record[1] <= 16 and record[2] and record[5]
if readable and not record[3] then
  return { 'UNCONCLUDED', record[1], record[2] }
end

local reports = read_reports(FIRST_RANK)
local world_size = #KEYS - FIRST_RANK + 1
local incarnations, missing, disagree = {}, {}, { 'DISAGREE' }
local log_number = log_end(KEYS[3])
local number = math.max((tonumber(record[1]) or 0) + 1, tonumber(floor) + 1, log_number + 1, server_ms())
local highest = highest_epoch(number - 1)
for rank = 0, world_size - 1 do
  local report = reports[rank + 1]
  local epoch, incarnation, _, _, rank_floor, rank_digest
  if report then
    epoch, incarnation, _, _, rank_floor, rank_digest = parse_report(report)
  end
  if not epoch or math.max(rank_floor, number_of(epoch)) > highest then
    missing[#missing + 1] = rank
  else
    incarnations[rank + 1] = incarnation
    number = math.max(number, rank_floor + 1)
    if rank_digest ~= '-' and rank_digest ~= digest then
      disagree[#disagree + 1] = tostring(rank)
      disagree[#disagree + 1] = rank_digest
    end
  end
end
if #missing > 0 then
  return not_ready(missing)
end
if #disagree > 1 then
  return disagree
end
if number >= INEXACT then
  return redis.error_reply('RANKGATE_CORRUPT ' .. KEYS[3] .. ' or ' .. KEYS[1] .. ' holds epoch ' .. whole(number - 1)
    .. ', which no planner can have given')
end

local attempt = whole(math.max(tonumber(record[4]) or 0, tonumber(ordinal)) + 1)
number = whole(number)
redis.call('DEL', KEYS[1])
redis.call('HSET', KEYS[1], 'wire', WIRE_VERSION, 'number', number, 'nonce', nonce, 'term', term, 'world_size', tostring(world_size),
  'digest', digest, 'ordinal', attempt, 'opened_ms', whole(server_ms()), 'last_n', '1', 'notes', notes)
write_roster(KEYS[1], incarnations)
redis.call('PEXPIRE', KEYS[1], record_ms)
announce(KEYS[3], number, 1, log_cap, record_ms, 'kind', 'opened', 'nonce', nonce, 'prev', '0', 'term', term)
hint(KEYS[4], signal_cap, record_ms, 'opened')
history(KEYS[5], event_cap, record_ms, number .. '-' .. nonce, 'Opened', 'ordinal', attempt,
  'roster', table.concat(incarnations, ','))
return { 'OPENED', number, nonce, attempt }
