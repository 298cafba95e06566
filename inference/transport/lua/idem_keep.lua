-- The answer to an Idempotency-Key. The tenant's oldest answers make room; their keys stay. Returns 1, or 0 where another
-- has answered or the record is not this request's.
-- KEYS: record, order of the tenant's answers, their sizes (and `total`).
-- ARGV: request id, status, headers, body, ttl seconds, bytes that the tenant's answers may have, seconds that events
--       are kept once the answer is.
local record, order, sizes = KEYS[1], KEYS[2], KEYS[3]
local held = redis.call('HMGET', record, 'request', 'state')
if held[1] ~= ARGV[1] or held[2] ~= 'open' then
  return 0
end

local function drop(name)
  local size = tonumber(redis.call('HGET', sizes, name) or 0)
  redis.call('HINCRBY', sizes, 'total', -size)
  redis.call('HDEL', sizes, name)
  redis.call('ZREM', order, name)
end

local now, ttl, most, size = time(), tonumber(ARGV[5]), tonumber(ARGV[6]), #ARGV[3] + #ARGV[4]
for _, name in ipairs(redis.call('ZRANGE', order, '-inf', text(now - ttl), 'BYSCORE')) do
  drop(name)
end
redis.call('EXPIRE', record, ttl)
if size > most then
  redis.call('HSET', record, 'state', 'lost')
  return 1
end
local oldest = redis.call('ZRANGE', order, 0, 0)
while #oldest > 0 and tonumber(redis.call('HGET', sizes, 'total') or 0) + size > most do
  drop(oldest[1])
  if redis.call('EXISTS', oldest[1]) == 1 then
    redis.call('HDEL', oldest[1], 'status', 'headers', 'body')
    redis.call('HSET', oldest[1], 'state', 'lost')
  end
  oldest = redis.call('ZRANGE', order, 0, 0)
end
redis.call('HSET', record, 'state', 'answered', 'status', ARGV[2], 'headers', ARGV[3], 'body', ARGV[4])
local ticket = redis.call('HMGET', 'ticket:' .. ARGV[1], 'state', 'patience')
if ticket[1] == 'done' and tonumber(ticket[2] or 0) >= 0 then -- one of the background is fetched by its own address, too
  redis.call('EXPIRE', 'ticket:' .. ARGV[1], ARGV[7], 'LT')
  redis.call('EXPIRE', 'gen:' .. ARGV[1], ARGV[7], 'LT')
end
redis.call('ZADD', order, text(now), record)
redis.call('HSET', sizes, record, size)
redis.call('HINCRBY', sizes, 'total', size)
redis.call('EXPIRE', order, ttl)
redis.call('EXPIRE', sizes, ttl)
return 1
