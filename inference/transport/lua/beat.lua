-- A worker lives. Returns what it must cancel as ids and reasons in turn, the leases that Redis believes it holds, and of
-- its pool: how many wait, how many lines of batches do, for how long the oldest of the former does, and how far apart
-- those are who had most and least.
-- ARGV: worker, pool, slots, heartbeat, ttl milliseconds, queue of batches, then model and slots in turn.
local worker, pool = ARGV[1], ARGV[2]
redis.call('SET', 'worker:' .. worker, ARGV[4], 'PX', ARGV[5])
redis.call('SADD', 'workers', worker)
hear()
redis.call('HSET', 'slots:' .. pool, worker, ARGV[3])
for i = 7, #ARGV, 2 do
  local slots = 'slots:' .. pool .. ':' .. ARGV[i]
  redis.call('HSET', slots, worker, ARGV[i + 1])
  redis.call('EXPIRE', slots, 60)
end
local cancels = {}
for _, id in ipairs(redis.call('SMEMBERS', 'cancels:' .. worker)) do
  cancels[#cancels + 1] = id
  cancels[#cancels + 1] = redis.call('HGET', 'ticket:' .. id, 'why') or 'cancelled'
end
local now = time()
local oldest, least, most = now, nil, nil
for _, model in ipairs(redis.call('SMEMBERS', 'models:' .. pool)) do
  local place = pool .. ':' .. model
  local first = redis.call('ZRANGE', 'oldest:' .. place, 0, 0, 'WITHSCORES')
  local low = redis.call('ZRANGE', 'heads:' .. place, 0, 0, 'WITHSCORES')
  local high = redis.call('ZRANGE', 'heads:' .. place, -1, -1, 'WITHSCORES')
  if #first > 0 and #low > 0 then
    oldest = math.min(oldest, tonumber(first[2]))
    least = math.min(least or tonumber(low[2]), tonumber(low[2]))
    most = math.max(most or tonumber(high[2]), tonumber(high[2]))
  end
end
return {
  cancels,
  redis.call('HKEYS', 'leases:' .. worker),
  redis.call('ZCARD', 'waiting:' .. pool),
  redis.call('ZCARD', 'waiting:' .. ARGV[6]),
  text(now - oldest),
  text((most or 0) - (least or 0)),
}
