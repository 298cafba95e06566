-- The oldest waiting ticket of a pool is leased to a worker. Returns {header, prompt, token}, or nil.
-- The prompt leaves Redis here: what a worker has is never handed to a second one.
-- ARGV: pool, worker, now.
local pool, worker = ARGV[1], ARGV[2]
local heads = 'heads:' .. pool
while true do
  local head = redis.call('ZRANGE', heads, 0, 0)
  if #head == 0 then
    return nil
  end
  local queue = 'queue:' .. pool .. ':' .. head[1]
  local first = redis.call('ZPOPMIN', queue)
  local next_one = redis.call('ZRANGE', queue, 0, 0, 'WITHSCORES')
  if #next_one == 0 then
    redis.call('ZREM', heads, head[1])
  else
    redis.call('ZADD', heads, next_one[2], head[1])
  end
  if #first > 0 then
    local ticket = 'ticket:' .. first[1]
    redis.call('ZREM', 'waiting:' .. pool, first[1])
    local parts = redis.call('HMGET', ticket, 'state', 'header', 'prompt')
    if parts[1] == 'waiting' then -- otherwise its hash has expired: nobody waits for it any more
      local token = redis.call('HINCRBY', ticket, 'token', 1)
      redis.call('HSET', ticket, 'state', 'leased', 'worker', worker, 'leased_at', ARGV[3])
      redis.call('HDEL', ticket, 'prompt')
      redis.call('HSET', 'leases:' .. worker, first[1], token)
      return {parts[2], parts[3], token}
    end
  end
end
