-- Claim what nobody serves any more, for the caller to settle and finish: leases of dead workers, tickets that waited
-- too long, claims whose claimer died. Compare-and-set: two sweepers never claim the same.
-- ARGV: now, most to claim, seconds after which a claim counts as dropped, seconds between two rings of a pool.
-- Returns {claims, rings}: claims are {why, header, token}; rings are {pool, number} of doorbells that seem lost.
local now, most = tonumber(ARGV[1]), tonumber(ARGV[2])
local claims, rings = {}, {}

local function claim(why, id)
  local ticket = 'ticket:' .. id
  local header = redis.call('HGET', ticket, 'header')
  if not header then
    redis.call('ZREM', 'claimed', id)
    return
  end
  local token = redis.call('HINCRBY', ticket, 'token', 1)
  redis.call('HSET', ticket, 'state', 'claimed', 'why', why)
  redis.call('HDEL', ticket, 'prompt')
  redis.call('ZADD', 'claimed', now, id)
  claims[#claims + 1] = {why, header, token}
end

local dropped = redis.call('ZRANGEBYSCORE', 'claimed', '-inf', now - tonumber(ARGV[3]), 'LIMIT', 0, most)
for _, id in ipairs(dropped) do
  claim(redis.call('HGET', 'ticket:' .. id, 'why') or 'cancelled', id)
end

for _, worker in ipairs(redis.call('SMEMBERS', 'workers')) do
  if redis.call('EXISTS', 'worker:' .. worker) == 0 then
    local leases = redis.call('HKEYS', 'leases:' .. worker)
    local left = 0
    for _, id in ipairs(leases) do
      if #claims >= most then
        left = left + 1
      else
        local held = redis.call('HMGET', 'ticket:' .. id, 'state', 'worker')
        if held[1] == 'leased' and held[2] == worker then
          claim('worker_lost', id)
        end
        redis.call('HDEL', 'leases:' .. worker, id)
      end
    end
    if left == 0 then
      redis.call('SREM', 'workers', worker)
      redis.call('DEL', 'leases:' .. worker, 'cancels:' .. worker)
    end
  end
end

for _, pool in ipairs(redis.call('SMEMBERS', 'pools')) do
  local waiting = 'waiting:' .. pool
  for _, id in ipairs(redis.call('ZRANGEBYSCORE', waiting, '-inf', now, 'LIMIT', 0, most)) do
    if #claims < most then
      local parts = redis.call('HMGET', 'ticket:' .. id, 'state', 'tenant')
      redis.call('ZREM', waiting, id)
      if parts[1] == 'waiting' then
        local queue = 'queue:' .. pool .. ':' .. parts[2]
        redis.call('ZREM', queue, id)
        local head = redis.call('ZRANGE', queue, 0, 0, 'WITHSCORES')
        if #head == 0 then
          redis.call('ZREM', 'heads:' .. pool, parts[2])
        else
          redis.call('ZADD', 'heads:' .. pool, head[2], parts[2])
        end
        claim('queue_timeout', id)
      end
    end
  end
  local number = redis.call('ZCARD', waiting)
  if number > 0 then
    local free = 0
    local threads = redis.call('HGETALL', 'threads:' .. pool)
    for i = 1, #threads, 2 do
      if redis.call('EXISTS', 'worker:' .. threads[i]) == 1 then
        free = free + tonumber(threads[i + 1]) - redis.call('HLEN', 'leases:' .. threads[i])
      else
        redis.call('HDEL', 'threads:' .. pool, threads[i])
        redis.call('HDEL', 'slots:' .. pool, threads[i])
      end
    end
    if free > 0 and redis.call('SET', 'ring:' .. pool, 1, 'NX', 'PX', math.floor(tonumber(ARGV[4]) * 1000)) then
      rings[#rings + 1] = {pool, math.min(number, free)}
    end
  end
end
return {claims, rings}
