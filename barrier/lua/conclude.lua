-- Set the verdict of an epoch and announce it in the task log. The first verdict wins.
-- KEYS: epoch leader tasks signals events
-- ARGV: term holder number nonce verdict seen_n record_ms log_cap signal_cap event_cap
-- Replies: CONCLUDED · ALREADY verdict · SUPERSEDED number nonce · FENCED term holder · UNKNOWN reason

local term, holder, number, nonce, verdict, seen_n, record_ms, log_cap, signal_cap, event_cap = unpack(ARGV)

local wrong = wrong_type({ { KEYS[1], 'hash' }, { KEYS[2], 'hash' }, { KEYS[3], 'stream' } })
if wrong then
  return wrong
end
local refusal = fenced(KEYS[2], term, holder)
if refusal then
  return refusal
end
local record = read_record(KEYS[1])
refusal = not_current(record, number, nonce)
if refusal then
  if refusal[1] == 'ABORTED' then
    return { 'ALREADY', refusal[2] }
  end
  return refusal
end

redis.call('HSET', KEYS[1], 'verdict', verdict)
redis.call('PEXPIRE', KEYS[1], record_ms)
-- If the log holds a later epoch (the record went back, the log did not), ranks read the verdict in the record only.
local log_number, log_n = log_end(KEYS[3])
if log_number <= tonumber(number) then
  local newest = math.max(log_number == tonumber(number) and log_n or 0, tonumber(record.last_n) or 0, tonumber(seen_n))
  announce(KEYS[3], number, newest + 1, log_cap, record_ms, 'kind', 'verdict', 'nonce', nonce, 'prev', whole(newest),
    'term', term, 'verdict', verdict)
  redis.call('HSET', KEYS[1], 'last_n', whole(newest + 1))
end
hint(KEYS[4], signal_cap, record_ms, 'verdict')
history(KEYS[5], event_cap, record_ms, number .. '-' .. nonce, 'Concluded', 'verdict', verdict)
return { 'CONCLUDED' }
