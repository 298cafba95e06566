-- Events of one sequence join its stream, if the writer still holds the ticket. With the last event, in the same step,
-- goes what the ledger must be told: a request that has ended is settled, whatever dies next.
-- Returns 1; 0 where the token is stale (another holds the ticket, or nobody); 2 where the events are there already.
-- KEYS: ticket, stream. ARGV: id, token, number of the last event or 0, ttl seconds (with the last event: where the
--       ticket names none), longest stream, outcome or '' if more events follow, prompt tokens that were computed and
--       tokens that were generated (of the whole request, with its outcome), events...

-- What the tenant was charged when the ticket was taken becomes what it has really had.
local function settle_share(ticket, tenant, num_computed, num_generated)
  local parts = redis.call('HMGET', ticket, 'pool', 'share_charged', 'share_weight')
  if not parts[2] then
    return -- nobody took it
  end
  local tokens = num_computed + OUTPUT_COST * num_generated
  set_had(parts[1], tenant, had(parts[1], tenant) + tokens / tonumber(parts[3]) - tonumber(parts[2]))
  if num_generated > 0 then
    local share = 'share:' .. tenant
    local mean = tonumber(redis.call('HGET', share, 'length') or num_generated)
    redis.call('HSET', share, 'length', text(mean + 0.25 * (num_generated - mean)))
    redis.call('EXPIRE', share, FORGET_SECONDS)
  end
end

local held = redis.call('HMGET', KEYS[1], 'token', 'sent', 'state', 'worker', 'tenant', 'key')
if held[1] ~= ARGV[2] then
  return 0
end
local number = tonumber(ARGV[3])
if held[3] == 'done' or (number > 0 and held[2] and number <= tonumber(held[2])) then
  return 2 -- the reply to an earlier attempt was lost
end
for i = 9, #ARGV do
  redis.call('XADD', KEYS[2], 'MAXLEN', '~', ARGV[5], '*', 'e', ARGV[i])
end
local ttl = tonumber(ARGV[4])
if ARGV[6] ~= '' then
  ttl = tonumber(redis.call('HGET', KEYS[1], 'keep') or ttl)
end
redis.call('EXPIRE', KEYS[2], ttl)
if ARGV[6] == '' then
  redis.call('HSET', KEYS[1], 'sent', number)
  return 1
end
local id = ARGV[1]
redis.call('HSET', 'settlements', id, redis.call('HGET', KEYS[1], 'header') .. '\n' .. ARGV[6])
redis.call('ZADD', 'unsettled', text(time()), id)
local is_json, outcome = pcall(cjson.decode, ARGV[6])
redis.call('HSET', KEYS[1], 'state', 'done', 'charged', is_json and outcome.charged_tokens or 1)
settle_share(KEYS[1], held[5], tonumber(ARGV[7]), tonumber(ARGV[8]))
redis.call('HDEL', KEYS[1], 'header', 'prompt')
redis.call('EXPIRE', KEYS[1], ttl)
redis.call('ZREM', 'claimed', id)
redis.call('SREM', 'of:key:' .. held[6], id)
redis.call('SREM', 'of:tenant:' .. held[5], id)
dismiss(id)
if held[4] then
  redis.call('HDEL', 'leases:' .. held[4], id)
  redis.call('SREM', 'cancels:' .. held[4], id)
end
return 1
