-- A worker lives. Returns the ids that it must cancel, the leases that Redis believes it holds, and how many wait.
-- ARGV: worker, pool, slots, heartbeat, ttl milliseconds.
local worker, pool = ARGV[1], ARGV[2]
redis.call('SET', 'worker:' .. worker, ARGV[4], 'PX', ARGV[5])
redis.call('SADD', 'workers', worker)
redis.call('HSET', 'slots:' .. pool, worker, ARGV[3])
return {
  redis.call('SMEMBERS', 'cancels:' .. worker),
  redis.call('HKEYS', 'leases:' .. worker),
  redis.call('ZCARD', 'waiting:' .. pool),
}
