-- The oldest waiting ticket among some models of a pool is leased to a worker. Returns {id, header, prompt, token} or nil.
-- The prompt leaves Redis here: what a worker has had is never handed to a second one.
-- ARGV: pool, worker, model ids...
local pool, worker = ARGV[1], ARGV[2]
while true do
  local model, tenant, arrival
  for i = 3, #ARGV do
    local head = redis.call('ZRANGE', 'heads:' .. pool .. ':' .. ARGV[i], 0, 0, 'WITHSCORES')
    if #head > 0 and (not arrival or tonumber(head[2]) < arrival) then
      model, tenant, arrival = ARGV[i], head[1], tonumber(head[2])
    end
  end
  if not model then
    return nil
  end
  local first = redis.call('ZRANGE', 'queue:' .. pool .. ':' .. model .. ':' .. tenant, 0, 0)
  if #first == 0 then
    update_head(pool, model, tenant)
  else
    local id = first[1]
    local ticket = 'ticket:' .. id
    unqueue(id, pool, model, tenant)
    local parts = redis.call('HMGET', ticket, 'state', 'header', 'prompt')
    if parts[1] == 'waiting' then -- otherwise its hash has expired: nobody waits for it any more
      local token = redis.call('HINCRBY', ticket, 'token', 1)
      redis.call('HSET', ticket, 'state', 'leased', 'worker', worker)
      redis.call('HDEL', ticket, 'prompt')
      redis.call('HSET', 'leases:' .. worker, id, token)
      return {id, parts[2], parts[3], token}
    end
  end
end
