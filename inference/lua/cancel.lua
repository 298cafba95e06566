-- Cancel a request. Waiting: it is claimed by the caller, who must settle and finish it. Leased: its worker is told.
-- Returns {state} or {'waiting', header, token}; nil for an unknown id. ARGV: id, now.
local id = ARGV[1]
local ticket = 'ticket:' .. id
local parts = redis.call('HMGET', ticket, 'state', 'pool', 'tenant', 'worker', 'header')
if not parts[1] then
  return nil
end
if parts[1] == 'leased' then
  redis.call('SADD', 'cancels:' .. parts[4], id)
  redis.call('EXPIRE', 'cancels:' .. parts[4], 3600)
  redis.call('PUBLISH', 'cancel:' .. parts[4], id)
  return {'running'}
end
if parts[1] ~= 'waiting' then
  return {'done'}
end
local queue = 'queue:' .. parts[2] .. ':' .. parts[3]
redis.call('ZREM', queue, id)
redis.call('ZREM', 'waiting:' .. parts[2], id)
local head = redis.call('ZRANGE', queue, 0, 0, 'WITHSCORES')
if #head == 0 then
  redis.call('ZREM', 'heads:' .. parts[2], parts[3])
else
  redis.call('ZADD', 'heads:' .. parts[2], head[2], parts[3])
end
local token = redis.call('HINCRBY', ticket, 'token', 1)
redis.call('HSET', ticket, 'state', 'claimed')
redis.call('HDEL', ticket, 'prompt')
redis.call('ZADD', 'claimed', ARGV[2], id)
return {'waiting', parts[5], token}
