-- One consistent picture of a group: reads only.
-- KEYS: epoch leader tasks signals rank...
-- ARGV:
-- Replies: now_ms, record fields, leader fields, newest log id, newest signal id, then for every rank its report and the milliseconds
--          that its lease has left (-2: there is no report; -1: it has no lifetime). A report that is too long is cut, one byte above the
--          limit

local wrong = wrong_type({ { KEYS[1], 'hash' }, { KEYS[2], 'hash' }, { KEYS[3], 'stream' } })
if wrong then
  return wrong
end
local FIRST_RANK = 5
local MAX_REPORT = 16384
local number, n = log_end(KEYS[3])
local signal = redis.pcall('XREVRANGE', KEYS[4], '+', '-', 'COUNT', 1) -- a hint stream that cannot be read counts as empty
local reply = {
  whole(server_ms()),
  redis.call('HGETALL', KEYS[1]),
  redis.call('HGETALL', KEYS[2]),
  whole(number) .. '-' .. whole(n),
  signal[1] and signal[1][1] or '0-0',
}
local reports = read_reports(FIRST_RANK)
for i = 1, #KEYS - FIRST_RANK + 1 do
  reply[#reply + 1] = string.sub(reports[i] or '', 1, MAX_REPORT + 1)
  reply[#reply + 1] = redis.call('PTTL', KEYS[FIRST_RANK + i - 1])
end
return reply
