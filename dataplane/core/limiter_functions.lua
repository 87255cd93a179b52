#!lua name=postroad
-- Limits in Redis or Valkey: token buckets, and slots that are held for a while; and which keys of submissions are taken.
-- The number in a name stands for its meaning: nodes of two versions may share a server, so a function that means something else gets another number.
--
-- Keys are "postroad:{<tag>}<key>" (dataplane.core.limits names both); in a cluster all keys of a call have one tag.
-- Capacities and levels are whole micro-tokens, rates micro-tokens a second, with a fraction where there is one; costs
-- and refunds are whole tokens. Time is this server's. A clock that went back counts as no time.
--
-- A bucket goes into debt: what costs more than the capacity passes when the bucket is full, and is paid whole. A level
-- below nothing grants nothing until time has paid for it. A debt ends at MOST, which a double still counts exactly. A
-- capacity of 0 is no limit, and nothing is kept of it.
--
--   what          value                                missing means                           expires
--   bucket        "<level> <microseconds of that>",    full; unless a seed says better         when it would be full
--                 the level below 0 for a debt
--   slots         sorted set: holder, end in us        nobody holds one                        with the last holder
--   epoch         when it was made, in us              what lay here was lost: a new epoch     after 40 days
--   submission    "pending <message> <content>" or     nobody has the key                      as the caller says
--                 "stored <message> <content>"
--
--   postroad_take_2    KEYS epoch, bucket...                    FCALL
--                      ARGS epoch the caller knows, empty when it does not care; number of buckets; capacity and rate
--                      of each; for each group: how many takes, then number of the bucket (from 1) and cost of each
--     Decides the groups one after the other, each all or nothing. A bucket grants when it holds the cost, or is full.
--     Returns the epoch (0 when nobody cares) and for each group that was refused three numbers: which group,
--     microseconds to wait, which of its takes refused. When the epoch is another than the caller knows nothing is
--     decided and only the epoch returned: the caller seeds what it remembers and asks again.
--   postroad_seed_2    KEYS bucket...   ARGS capacity, rate, level of each            FCALL
--     Lowers buckets to the level given; what is lower stays. Returns 0.
--   postroad_refund_2  KEYS bucket...   ARGS capacity, rate, tokens of each           FCALL
--     Gives tokens back, never above the capacity; less than none takes more, and goes into debt. Returns 0.
--   postroad_hold_1    KEYS slots...    ARGS for each group: how many slots, then capacity, milliseconds, holder of each
--                                                                                     FCALL
--     Each group holds all its slots until the milliseconds are over, or none; what the holder has is renewed. A refusal
--     writes nothing. Returns two numbers a group: microseconds to wait and which slot refused; 0 and 0 when held.
--   postroad_release_1 KEYS slots...    ARGS holder of each                           FCALL
--     Returns 0.
--   postroad_peek_2    KEYS bucket...   ARGS capacity, rate of each                   FCALL or FCALL_RO
--     Returns the level of each now, below 0 for a debt; a missing bucket is full.
--   postroad_count_1   KEYS slots...    no ARGS                                       FCALL or FCALL_RO
--     Returns how many slots of each are held now.
--   postroad_claim_1   KEYS submission  ARGS message, hash of the content, milliseconds   FCALL
--     Lets the message have the key for so long if nobody has it. Returns what it found and the message that has it:
--     0 nobody, or this message; 1 another is pending; 2 another is stored; 3 another content, pending or stored.
--   postroad_stored_1  KEYS submission  ARGS message, hash of the content, milliseconds   FCALL
--     Notes for so long that the message is stored, unless the key is another's. Returns 0.
--   postroad_withdraw_1 KEYS submission ARGS message                                  FCALL
--     Gives the key free if the message has it and is pending. Returns 0.
--
-- A user that calls them needs, on ~postroad:*, +fcall +time +get +set +pexpireat +zadd +zrem +zcard +zscore +zrange
-- +zremrangebyscore; one that looks only, +fcall_ro +time +get +zcount. Who loads them: +function|load.

local MICRO = 1000000
local DAY_US = 86400 * MICRO
local LONGEST_US = 3650 * DAY_US
local MOST = 4000000000 * MICRO
local EPOCH_MS = 40 * 86400 * 1000
local HOLD_AGAIN_US = MICRO

local function now_us()
  local time = redis.call('TIME')
  return tonumber(time[1]) * MICRO + tonumber(time[2])
end

local function level_of(key, capacity, rate, now)
  local value = redis.call('GET', key)
  if not value then
    return capacity, true
  end
  local level, since = string.match(value, '^(%-?%d+) (%d+)$')
  if not level then
    return capacity, true
  end
  local elapsed = math.max(0, now - tonumber(since))
  return math.min(capacity, tonumber(level) + math.floor(elapsed * rate / MICRO)), false
end

local function store(key, level, capacity, rate, now)
  local until_full_us = DAY_US
  if rate > 0 then
    until_full_us = math.min((capacity - level) * MICRO / rate, LONGEST_US)
  end
  local expire_ms = math.max(1, math.ceil(until_full_us / 1000))
  redis.call('SET', key, string.format('%.0f %.0f', level, now), 'PX', string.format('%.0f', expire_ms))
end

local function epoch_of(key, now)
  local epoch = redis.call('GET', key)
  if epoch then
    return tonumber(epoch)
  end
  redis.call('SET', key, string.format('%.0f', now), 'PX', EPOCH_MS)
  return now
end

local function take(keys, args)
  local now = now_us()
  local epoch = 0
  if args[1] ~= '' then
    epoch = epoch_of(keys[1], now)
    if epoch ~= tonumber(args[1]) then
      return {epoch}
    end
  end
  local bucket_count = tonumber(args[2])
  local capacities, rates, levels, touched = {}, {}, {}, {}
  for bucket = 1, bucket_count do
    local capacity, rate = tonumber(args[1 + 2 * bucket]), tonumber(args[2 + 2 * bucket])
    capacities[bucket], rates[bucket] = capacity, rate
    levels[bucket] = level_of(keys[1 + bucket], capacity, rate, now)
  end
  local answers = {epoch}
  local at, group = 3 + 2 * bucket_count, 0
  while args[at] do
    local count = tonumber(args[at])
    local wait, refused, before = 0, 0, {}
    group = group + 1
    for number = 1, count do
      local bucket = tonumber(args[at + 2 * number - 1])
      local cost, capacity, level = tonumber(args[at + 2 * number]) * MICRO, capacities[bucket], levels[bucket]
      before[number] = level
      if capacity > 0 then
        local needs_level = math.min(cost, capacity)
        if level < needs_level then
          local rate = rates[bucket]
          local needs = rate > 0 and math.min(math.ceil((needs_level - level) * MICRO / rate), LONGEST_US) or DAY_US
          if needs > wait then
            wait, refused = needs, number
          end
        end
        levels[bucket] = level - cost
      end
    end
    for number = count, 1, -1 do
      local bucket = tonumber(args[at + 2 * number - 1])
      if refused > 0 then
        levels[bucket] = before[number]
      elseif capacities[bucket] > 0 then
        touched[bucket] = true
      end
    end
    if refused > 0 then
      answers[#answers + 1] = group
      answers[#answers + 1] = wait
      answers[#answers + 1] = refused
    end
    at = at + 1 + 2 * count
  end
  for bucket = 1, bucket_count do
    if touched[bucket] then
      store(keys[1 + bucket], levels[bucket], capacities[bucket], rates[bucket], now)
    end
  end
  return answers
end

local function seed(keys, args)
  local now = now_us()
  for bucket, key in ipairs(keys) do
    local capacity, rate = tonumber(args[3 * bucket - 2]), tonumber(args[3 * bucket - 1])
    local level = math.max(-MOST, tonumber(args[3 * bucket]))
    if level < level_of(key, capacity, rate, now) then
      store(key, level, capacity, rate, now)
    end
  end
  return 0
end

local function refund(keys, args)
  local now = now_us()
  for bucket, key in ipairs(keys) do
    local capacity, rate = tonumber(args[3 * bucket - 2]), tonumber(args[3 * bucket - 1])
    local level, missing = level_of(key, capacity, rate, now)
    local change = tonumber(args[3 * bucket]) * MICRO
    if capacity > 0 and (not missing or change < 0) then
      store(key, math.max(-MOST, math.min(capacity, level + change)), capacity, rate, now)
    end
  end
  return 0
end

local function peek(keys, args)
  local now = now_us()
  local levels = {}
  for bucket, key in ipairs(keys) do
    levels[bucket] = level_of(key, tonumber(args[2 * bucket - 1]), tonumber(args[2 * bucket]), now)
  end
  return levels
end

local function until_free(key, now)
  local first = redis.call('ZRANGE', key, 0, 0, 'WITHSCORES')
  return math.max(1, math.min(HOLD_AGAIN_US, tonumber(first[2] or now) - now))
end

local function keep(key, holder, end_us)
  redis.call('ZADD', key, string.format('%.0f', end_us), holder)
  local last = redis.call('ZRANGE', key, -1, -1, 'WITHSCORES')
  redis.call('PEXPIREAT', key, string.format('%.0f', math.ceil(tonumber(last[2]) / 1000)))
end

local function hold(keys, args)
  local now = now_us()
  local answers = {}
  local key_at, at = 0, 1
  while args[at] do
    local count = tonumber(args[at])
    local wait, refused, wanted = 0, 0, {}
    for number = 1, count do
      local key, capacity, holder = keys[key_at + number], tonumber(args[at + 3 * number - 2]), args[at + 3 * number]
      redis.call('ZREMRANGEBYSCORE', key, '-inf', string.format('%.0f', now))
      if not redis.call('ZSCORE', key, holder) then
        wanted[key] = (wanted[key] or 0) + 1
        if redis.call('ZCARD', key) + wanted[key] > capacity then
          local needs = until_free(key, now)
          if needs > wait then
            wait, refused = needs, number
          end
        end
      end
    end
    if refused == 0 then
      for number = 1, count do
        keep(keys[key_at + number], args[at + 3 * number], now + tonumber(args[at + 3 * number - 1]) * 1000)
      end
    end
    answers[#answers + 1] = wait
    answers[#answers + 1] = refused
    key_at = key_at + count
    at = at + 1 + 3 * count
  end
  return answers
end

local function release(keys, args)
  for number, key in ipairs(keys) do
    redis.call('ZREM', key, args[number])
  end
  return 0
end

local function count(keys)
  local now = string.format('(%.0f', now_us())
  local counts = {}
  for number, key in ipairs(keys) do
    counts[number] = redis.call('ZCOUNT', key, now, '+inf')
  end
  return counts
end

local function submission_at(key)
  return string.match(redis.call('GET', key) or '', '^(%l+) (%S+) (%S+)$')
end

local function note_submission(key, state, args)
  redis.call('SET', key, state .. ' ' .. args[1] .. ' ' .. args[2], 'PX', args[3])
end

local function claim(keys, args)
  local state, message, content = submission_at(keys[1])
  if not state or (state == 'pending' and message == args[1]) then
    note_submission(keys[1], 'pending', args)
    return {0, args[1]}
  end
  if content ~= args[2] then
    return {3, message}
  end
  return {state == 'stored' and 2 or 1, message}
end

local function stored(keys, args)
  local state, message = submission_at(keys[1])
  if not state or message == args[1] then
    note_submission(keys[1], 'stored', args)
  end
  return 0
end

local function withdraw(keys, args)
  local state, message = submission_at(keys[1])
  if state == 'pending' and message == args[1] then
    -- A time that is over removes it, by a right that callers have.
    redis.call('PEXPIREAT', keys[1], 1)
  end
  return 0
end

redis.register_function('postroad_take_2', take)
redis.register_function('postroad_seed_2', seed)
redis.register_function('postroad_refund_2', refund)
redis.register_function('postroad_hold_1', hold)
redis.register_function('postroad_release_1', release)
redis.register_function{function_name='postroad_peek_2', callback=peek, flags={'no-writes'}}
redis.register_function{function_name='postroad_count_1', callback=count, flags={'no-writes'}}
redis.register_function('postroad_claim_1', claim)
redis.register_function('postroad_stored_1', stored)
redis.register_function('postroad_withdraw_1', withdraw)
