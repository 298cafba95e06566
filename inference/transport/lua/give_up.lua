-- A worker does not serve these leases after all: the sweep ends them at once. ARGV: worker, ids...
for i = 2, #ARGV do
  local held = redis.call('HMGET', 'ticket:' .. ARGV[i], 'state', 'worker')
  redis.call('HDEL', 'leases:' .. ARGV[1], ARGV[i])
  if held[1] == 'leased' and held[2] == ARGV[1] then
    redis.call('HSET', 'ticket:' .. ARGV[i], 'state', 'claimed', 'why', 'worker_lost')
    redis.call('ZADD', 'claimed', 0, ARGV[i])
  end
end
return 1
