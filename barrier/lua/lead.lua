-- Take, renew or give back the leadership of a group.
-- KEYS: leader
-- ARGV: holder lease_ms floor record_ms
-- Replies: LEADER term · FOLLOWER holder term left_ms · RESIGNED
--
-- A lease of 0 gives it back. The term is a fencing token. A new term is above the stored one, the caller's floor and the store's clock, so
-- a store that forgot the leadership does not issue a term again. The holder is compared too, as an epoch's nonce is.

local holder, lease_ms, floor, record_ms = unpack(ARGV)

local wrong = wrong_type({ { KEYS[1], 'hash' } })
if wrong then
  return wrong
end
local now = server_ms()
local stored = redis.call('HMGET', KEYS[1], 'term', 'holder', 'until_ms')
local term, until_ms = tonumber(stored[1]), tonumber(stored[3])
local mine = stored[2] == holder

if tonumber(lease_ms) == 0 then
  if mine then
    redis.call('HSET', KEYS[1], 'until_ms', '0')
  end
  return { 'RESIGNED' }
end
if term and until_ms and not mine and until_ms > now then
  -- Only a clock that was set back leaves so long a lease. It is shortened, or a dead leader would keep it; a live one renews it in time.
  if until_ms > now + 2 * tonumber(lease_ms) then
    until_ms = now + tonumber(lease_ms)
    redis.call('HSET', KEYS[1], 'until_ms', whole(until_ms))
  end
  return { 'FOLLOWER', stored[2], stored[1], whole(until_ms - now) }
end
if not (term and mine) then
  term = math.max((term or 0) + 1, tonumber(floor) + 1, now)
end
redis.call('HSET', KEYS[1], 'term', whole(term), 'holder', holder, 'until_ms', whole(now + tonumber(lease_ms)))
redis.call('PEXPIRE', KEYS[1], record_ms)
return { 'LEADER', whole(term) }
