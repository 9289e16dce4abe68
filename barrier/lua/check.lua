-- Ask what `dispatch` asks: have all ranks arrived, at this instant? Reads only.
-- KEYS: epoch rank...
-- ARGV: number nonce rule...
-- Replies: READY · NOT_READY rank... · ABORTED verdict · SUPERSEDED number nonce · UNKNOWN reason

local number, nonce = unpack(ARGV, 1, 2)
local FIRST_RANK, FIRST_RULE = 2, 3

local world_size = #KEYS - FIRST_RANK + 1
local record, wrong = read_record(KEYS[1], world_size)
if wrong then
  return wrong
end
local refusal = not_current(record, number, nonce)
if refusal then
  return refusal
end
local roster, unknown = roster_of(record, world_size)
if not roster then
  return unknown
end
local missing = missing_ranks(record, roster, FIRST_RANK, FIRST_RULE)
if #missing > 0 then
  return not_ready(missing)
end
return { 'READY' }
