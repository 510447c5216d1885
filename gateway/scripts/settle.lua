-- Settle: the event (or the filler in its place), the hold and the counters, in one step, once.
--
-- KEYS 1 usage stream   2 last applied seq of the producer   3 holds   4 leases   5 progress
--      6,7 scope of tenant, key   8,9 month of tenant, key   10,11 rate of tenant, key   12 marker of an ended call
--      13 credits spent, where the tenant has bought any
-- ARGV 1 'settle' or 'sweep'   2 producer   3 seq   4 floor: lowest seq not yet acknowledged to the producer
--      5 call id   6 event   7 '1': leave a marker that the call was settled
--      8 cost, nano-currency   9 served model id, '' when not billed   10 input tokens   11 output tokens
--      12 second of admission, '' when no rate was charged   13 tokens, true minus estimated
--      14 month of the tenant's zone, with KEYS 13
-- Reply 'event', 'superseded' or 'applied' (this seq was here before: the reply had been lost).
--
-- Order. A producer's events are applied in the order of seq. A seq that is not the next one is refused, or an
-- error on one command would let the next one pass and the retry of the first look like a duplicate. Only
-- where this server lost acknowledged events (last applied < floor - 1) may a producer go on, from its floor.
-- A producer that settles nothing for 40 days is forgotten; if it lives, it goes on from its floor.
--
-- A late settle. Where a call was swept and its own settle comes after all, the settle knows better: its event goes
-- out as a filler, from which metering amends the abandoned one, and the month's sums get the difference here.

-- Replays may come until then: spools that are older are not adopted (`spool.py`, REPLAY_AGE_MAX_S).
local MARKER_TTL_S = 40 * 86400
local MONTH_TTL_S = 100 * 86400
local SLOTS = 61
-- Sums stop there: admission compares them as doubles, and an overflow would refuse this settle at each retry.
local SUM_MAX = 2^53 - 1

-- Add to a sum, `SUM_MAX` at most; return the sum.
local function add(key, field, number)
  local sum = redis.call('HINCRBY', key, field, math.min(number, SUM_MAX))
  if sum > SUM_MAX then
    redis.call('HSET', key, field, string.format('%.0f', SUM_MAX))
  end
  return sum
end

local producer, call_id, event = ARGV[2], ARGV[5], ARGV[6]
local seq, floor = tonumber(ARGV[3]), tonumber(ARGV[4])
local applied = tonumber(redis.call('GET', KEYS[2])) or 0
if seq <= applied then
  return 'applied'
end
if seq ~= applied + 1 and not (applied < floor - 1 and seq == floor) then
  return redis.error_reply('OUTOFORDER seq ' .. ARGV[3] .. ' cannot follow ' .. applied)
end

-- Add to the month's sums what the call costs and uses, less what a sweep has counted for it.
local function count(swept_cost, swept_model, swept_input, swept_output)
  local cost = tonumber(ARGV[8]) - swept_cost
  for month = 8, 9 do
    if add(KEYS[month], 'cost', cost) == cost then
      redis.call('EXPIRE', KEYS[month], MONTH_TTL_S)
    end
  end
  if KEYS[13] then
    add(KEYS[13], ARGV[14], cost)
  end
  local model = ARGV[9] ~= '' and ARGV[9] or swept_model
  if model ~= '' then
    local calls = (ARGV[9] ~= '' and 1 or 0) - (swept_model ~= '' and 1 or 0)
    redis.call('HINCRBY', KEYS[8], model .. ':calls', calls)
    add(KEYS[8], model .. ':input', tonumber(ARGV[10]) - swept_input)
    add(KEYS[8], model .. ':output', tonumber(ARGV[11]) - swept_output)
    add(KEYS[8], model .. ':cost', cost)
  end
end

local hold = redis.call('HGET', KEYS[3], call_id)
local superseded, swept
if ARGV[1] == 'settle' then
  local ended = redis.call('GET', KEYS[12])
  superseded = ended and string.sub(ended, 1, 5) == 'swept'
  -- Markers of older versions say nothing of what the sweep has counted.
  swept = superseded and #ended > 5 and cmsgpack.unpack(string.sub(ended, 6))
else
  local lease = redis.call('ZSCORE', KEYS[4], call_id)
  local clock = redis.call('TIME')
  local now_ms = tonumber(clock[1]) * 1000 + math.floor(tonumber(clock[2]) / 1000)
  superseded = not hold or not lease or tonumber(lease) > now_ms
end

if superseded then
  -- contract.usage_event.Superseded: msgpack array of producer, seq, call id and the event's bytes.
  local filler = '\148' .. cmsgpack.pack(producer) .. cmsgpack.pack(seq) .. cmsgpack.pack(call_id)
    .. '\198' .. struct.pack('>I4', #event) .. event
  redis.call('XADD', KEYS[1], '*', 's', filler)
  redis.call('SET', KEYS[2], ARGV[3], 'EX', MARKER_TTL_S)
  if swept then
    count(unpack(swept))
    redis.call('SET', KEYS[12], 'settled', 'EX', MARKER_TTL_S)
  end
  return 'superseded'
end

redis.call('XADD', KEYS[1], '*', 'e', event)
redis.call('SET', KEYS[2], ARGV[3], 'EX', MARKER_TTL_S)
if hold then
  -- 0 - x, not -x: Redis does not read '-0' as an integer.
  local record = cmsgpack.unpack(hold)
  local released = string.format('%.0f', 0 - record[1])
  redis.call('HDEL', KEYS[3], call_id)
  redis.call('ZREM', KEYS[4], call_id)
  redis.call('HDEL', KEYS[5], call_id)
  for scope = 6, 7 do
    redis.call('HINCRBY', KEYS[scope], 'running', -1)
    redis.call('HINCRBY', KEYS[scope], 'held', released)
  end
  if record[13] then
    redis.call('HINCRBY', KEYS[6], 'held:' .. record[5], released)
  end
end
if ARGV[1] == 'sweep' then
  local counted = cmsgpack.pack({tonumber(ARGV[8]), ARGV[9], tonumber(ARGV[10]), tonumber(ARGV[11])})
  redis.call('SET', KEYS[12], 'swept' .. counted, 'EX', MARKER_TTL_S)
elseif ARGV[7] == '1' then
  redis.call('SET', KEYS[12], 'settled', 'EX', MARKER_TTL_S)
end

count(0, '', 0, 0)

if ARGV[12] ~= '' then
  local bucket = tonumber(ARGV[12])
  for rate = 10, 11 do
    local second = tonumber(redis.call('HGET', KEYS[rate], 'second'))
    if second and second - bucket < SLOTS then
      redis.call('HINCRBY', KEYS[rate], 't' .. bucket % SLOTS, ARGV[13])
      redis.call('HINCRBY', KEYS[rate], 'tokens', ARGV[13])
    end
  end
end
return 'event'
