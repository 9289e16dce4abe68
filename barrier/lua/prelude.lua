-- Shared by every verb: this text stands before the verb's own. Only `announce`, `write_*`, `hint` and `history` write.

local WIRE_VERSION = '1' -- as in barrier/protocol/wire.py
local ROSTER_CHUNK = 64 -- incarnations in one roster field, so that a rank reads 64 of them and not 4,096
local INCARNATION_WIDTH = 28
local APPLIED_WIDTH = 10
local DAY_MS = 86400000
local SLICE = 2000 -- keys in one MGET; Lua's stack holds 8,000
local ENDPOINTS_CHUNK = 64
local MAX_ENDPOINT = 300

-- Milliseconds: Lua numbers are doubles, and tostring would shorten microseconds.
local function server_ms()
  local time = redis.call('TIME')
  return tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000)
end

local function whole(number)
  return string.format('%.0f', number)
end

-- Returns an error reply for the first key that has a wrong type, or nil. Called before the first write.
local function wrong_type(expected)
  for _, pair in ipairs(expected) do
    local found = redis.call('TYPE', pair[1])['ok']
    if found ~= 'none' and found ~= pair[2] then
      return redis.error_reply('RANKGATE_CORRUPT ' .. pair[1] .. ' holds a ' .. found .. ' where a ' .. pair[2] .. ' belongs')
    end
  end
  return nil
end

-- Returns fields of a hash; or nil and an error reply. It asks for the key's type only after a read failed.
local function fields_of(key, ...)
  local values = redis.pcall('HMGET', key, ...)
  if values.err then
    return nil, wrong_type({ { key, 'hash' } }) or values
  end
  return values
end

-- Returns FENCED, or nil if the planner's (term, holder) is the stored one. Without a stored leadership, every planner is fenced.
local function fenced(leader_key, term, holder)
  local leader, wrong = fields_of(leader_key, 'term', 'holder')
  if wrong then
    return wrong
  end
  if leader[1] ~= term or leader[2] ~= holder then
    return { 'FENCED', string.match(leader[1] or '', '^%d+$') or '0', leader[2] or '' }
  end
  return nil
end

-- Returns why the caller may not act in this epoch, or nil. A record without a version has version 1. If the stored number is below the
-- caller's, the store went back.
local function not_current(record, number, nonce)
  if not record.number or not record.nonce or not record.world_size then
    return { 'UNKNOWN', 'the store has no epoch record' }
  end
  if (record.wire or '1') ~= WIRE_VERSION then
    return { 'UNKNOWN', 'the record has wire version ' .. string.sub(record.wire, 1, 20) .. ', and this version of rankgate reads ' .. WIRE_VERSION }
  end
  if record.number ~= number or record.nonce ~= nonce then
    if (tonumber(record.number) or 0) < tonumber(number) then
      return { 'UNKNOWN', 'the store went back to epoch ' .. record.number }
    end
    return { 'SUPERSEDED', record.number, record.nonce }
  end
  if record.verdict then
    return { 'ABORTED', record.verdict }
  end
  return nil
end

-- The highest epoch number that a rank can have promised: the highest number that the record, the log or the caller knows (`...`), or the
-- store's clock and a day, whichever is more. A rank that reports a higher number counts as missing, and nobody takes its number over:
-- after 2^53 there would be no number left. A day is more than any mistake about time zones or summer time. If the clock was ahead by more
-- than a day and was set back, the known numbers are the limit.
local function highest_epoch(...)
  return math.max(server_ms() + DAY_MS, ...)
end

-- Returns what the verbs need of the record, in one read; or nil and an error reply. With a world size it reads the roster too, in chunks
-- (see `roster_of`). `...` are the fields of steps, which hold where a step was dispatched.
local function read_record(epoch_key, world_size, ...)
  local fields = { 'number', 'nonce', 'world_size', 'verdict', 'last_n', 'wire', ... }
  for chunk = 0, math.ceil((world_size or 0) / ROSTER_CHUNK) - 1 do
    fields[#fields + 1] = 'roster:' .. chunk
  end
  local values, wrong = fields_of(epoch_key, unpack(fields))
  if wrong then
    return nil, wrong
  end
  local record = {}
  for i = 1, #fields do
    record[fields[i]] = values[i]
  end
  return record
end

-- Returns the roster, if the record is for as many ranks as the caller has; otherwise nil and a refusal.
local function roster_of(record, world_size)
  if tonumber(record.world_size) ~= world_size then
    return nil, { 'UNKNOWN', 'the record says world_size ' .. record.world_size .. ', the caller ' .. world_size }
  end
  local chunks = {}
  for chunk = 0, math.ceil(world_size / ROSTER_CHUNK) - 1 do
    chunks[chunk + 1] = record['roster:' .. chunk] or ''
  end
  local roster = table.concat(chunks)
  if #roster ~= world_size * INCARNATION_WIDTH then
    return nil, { 'UNKNOWN', 'the record has no whole roster' }
  end
  return roster
end

local function write_roster(epoch_key, incarnations)
  for first = 1, #incarnations, ROSTER_CHUNK do
    local last = math.min(first + ROSTER_CHUNK - 1, #incarnations)
    redis.call('HSET', epoch_key, 'roster:' .. math.floor((first - 1) / ROSTER_CHUNK),
      table.concat(incarnations, '', first, last))
  end
end

-- Reports of all ranks, KEYS[first_key] onwards.
local function read_reports(first_key)
  local reports = {}
  for first = first_key, #KEYS, SLICE do
    local values = redis.call('MGET', unpack(KEYS, first, math.min(first + SLICE - 1, #KEYS)))
    for i = 1, #values do
      reports[#reports + 1] = values[i]
    end
  end
  return reports
end

-- Writes where each rank's engine waits for the others, for all ranks to read: ENDPOINTS_CHUNK lines in each field, in rank order. An
-- invalid endpoint becomes an empty line, so one rank's report cannot shift the endpoints of others. The pattern cannot match foreign text:
-- there, quotes are escaped.
local function write_endpoints(epoch_key, reports)
  local endpoints = {}
  for rank = 1, #reports do
    local said = string.match(reports[rank] or '', '"endpoint":"([%w.:_%-%[%]]*)"') or ''
    endpoints[rank] = #said <= MAX_ENDPOINT and said or ''
  end
  for first = 1, #endpoints, ENDPOINTS_CHUNK do
    local last = math.min(first + ENDPOINTS_CHUNK - 1, #endpoints)
    redis.call('HSET', epoch_key, 'endpoints:' .. math.floor((first - 1) / ENDPOINTS_CHUNK),
      table.concat(endpoints, '\n', first, last))
  end
end

-- A report's header: 2|<number>-<nonce> or -|<status>|<applied>|<incarnation>|<floor>|<digest>|{...}
-- Returns epoch, incarnation, status, applied, floor, digest; nil if the bytes are not a report of ours.
local function parse_report(report)
  local epoch, status, applied, incarnation, floor, digest =
    string.match(report, '^2|([^|]+)|(%a%w*)|(%d+)|(%x+)|(%d+)|([^|]+)|')
  if not epoch or #incarnation ~= INCARNATION_WIDTH then
    return nil
  end
  return epoch, incarnation, status, tonumber(applied), tonumber(floor), digest
end

-- Returns the ranks that are missing: a rank has arrived if its live report is of exactly this epoch and incarnation, in a wanted status.
-- Also returns the highest log position that an arrived rank has applied.
-- Rules are triplets in ARGV from `first_rule`: first rank, last rank, statuses joined by commas.
-- This loop runs for every rank, between the last arrival and the dispatch. So it compares prefixes and decodes nothing: most reports begin
-- as one that was right before (epoch, status, position). All incarnations are compared with the roster at once, and one by one only after
-- a difference.
local function missing_ranks(record, roster, first_key, first_rule)
  local sub, find = string.sub, string.find -- `sub` makes a string, and Lua hashes it; `find` makes none
  local head = '2|' .. record.number .. '-' .. record.nonce .. '|'
  local missing, highest, last_rank = {}, '0', #KEYS - first_key
  for rule = first_rule, #ARGV, 3 do
    local statuses = {}
    for status in string.gmatch(ARGV[rule + 2], '[^,]+') do
      statuses[#statuses + 1] = head .. status .. '|'
    end
    local first, last = tonumber(ARGV[rule]), tonumber(ARGV[rule + 1])
    local right, length = nil, 0

    local function begins_right(report)
      for i = 1, #statuses do
        local wanted = statuses[i]
        if sub(report, 1, #wanted) == wanted then
          local applied = sub(report, #wanted + 1, #wanted + APPLIED_WIDTH)
          if applied > highest then
            highest = applied
          end
          right, length = wanted .. applied, #wanted + APPLIED_WIDTH
          return true
        end
      end
      return false
    end

    for slice = first, last, SLICE do
      local slice_last = math.min(slice + SLICE - 1, last)
      local arrived, count = {}, slice_last - slice + 1 -- first reports, then the incarnation of each report that counts
      if slice >= 0 and slice <= last_rank then
        arrived = redis.call('MGET', unpack(KEYS, first_key + slice, first_key + math.min(slice_last, last_rank)))
      end
      for i = 1, count do
        local report = arrived[i]
        if report and (right and find(report, right, 1, true) == 1 or begins_right(report)) then
          arrived[i] = sub(report, length + 2, length + 1 + INCARNATION_WIDTH)
        else
          arrived[i] = ''
        end
      end
      local expected = sub(roster, slice * INCARNATION_WIDTH + 1, (slice_last + 1) * INCARNATION_WIDTH)
      if #expected ~= count * INCARNATION_WIDTH or table.concat(arrived) ~= expected then
        for i = 1, count do
          local before = (slice + i - 1) * INCARNATION_WIDTH
          if arrived[i] == '' or arrived[i] ~= sub(roster, before + 1, before + INCARNATION_WIDTH) then
            missing[#missing + 1] = slice + i - 1
          end
        end
      end
    end
  end
  return missing, tonumber(highest) or 0
end

local function number_of(epoch)
  return tonumber(string.match(epoch, '^%d+') or 0)
end

local function not_ready(missing)
  local reply = { 'NOT_READY' }
  for i = 1, #missing do
    reply[i + 1] = tostring(missing[i])
  end
  return reply
end

-- Returns number, position and kind of the newest entry of the log. If the log was trimmed to nothing, the kind is empty.
local function log_end(tasks_key)
  local newest = redis.call('XREVRANGE', tasks_key, '+', '-', 'COUNT', 1)
  local id = newest[1] and newest[1][1]
  if not id then
    if redis.call('EXISTS', tasks_key) == 0 then
      return 0, 0, ''
    end
    local info = redis.call('XINFO', 'STREAM', tasks_key)
    for i = 1, #info - 1, 2 do
      if info[i] == 'last-generated-id' then
        id = info[i + 1]
      end
    end
  end
  local number, n = string.match(id or '', '^(%d+)-(%d+)$')
  return tonumber(number) or 0, tonumber(n) or 0, newest[1] and newest[1][2][2] or ''
end

-- Append to the log at an explicit id and keep its lifetime.
local function announce(tasks_key, number, n, cap, lifetime_ms, ...)
  local id = whole(tonumber(number)) .. '-' .. whole(n)
  redis.call('XADD', tasks_key, 'MAXLEN', cap, id, ...)
  redis.call('PEXPIRE', tasks_key, lifetime_ms)
  return id
end

-- Appends a hint or an event after a verb's own writes. It raises nothing: hints and history stop no verb. Every rank may append to these
-- streams, and a rank that takes the last possible id leaves none for the others. Such a stream, or a key of another type in its place, is
-- deleted and begun anew. PEXPIRE deletes it: everybody who may append has the right to that command.
local function append_if_possible(key, cap, lifetime_ms, ...)
  local added = redis.pcall('XADD', key, 'MAXLEN', '~', cap, '*', ...)
  local refusal = type(added) == 'table' and tostring(added.err) or ''
  if string.find(refusal, 'WRONGTYPE') or string.find(refusal, 'exhausted') then
    redis.pcall('PEXPIRE', key, -1)
    redis.pcall('XADD', key, 'MAXLEN', '~', cap, '*', ...)
  end
  redis.pcall('PEXPIRE', key, lifetime_ms)
end

local function hint(signals_key, cap, lifetime_ms, kind)
  append_if_possible(signals_key, cap, lifetime_ms, 'kind', kind)
end

-- The history is in the store's own order. So a checker need not trust a clock.
local function history(events_key, cap, lifetime_ms, epoch, kind, ...)
  append_if_possible(events_key, cap, lifetime_ms, 'source', 'planner', 'epoch', epoch, 'kind', kind, ...)
end
