-- Keep a completion; the tenant's least recently used ones make room. KEYS: entry, index of the tenant.
-- ARGV: value, ttl seconds, most entries of a tenant.
redis.call('SET', KEYS[1], ARGV[1], 'EX', ARGV[2])
redis.call('ZADD', KEYS[2], text(time()), KEYS[1])
redis.call('EXPIRE', KEYS[2], ARGV[2])
local surplus = redis.call('ZCARD', KEYS[2]) - tonumber(ARGV[3])
if surplus > 0 then
  for _, name in ipairs(redis.call('ZRANGE', KEYS[2], 0, surplus - 1)) do
    redis.call('DEL', name)
    redis.call('ZREM', KEYS[2], name)
  end
end
return 1
