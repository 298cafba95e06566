-- A reader of a request has gone. Returns {'kept'} where it goes on, else as `cancel` of common.lua.
-- A web process that was taken for dead has been counted already. Sent again, it counts once.
-- ARGV: id, web, id of this leaving.
local id, held = ARGV[1], 'held:' .. ARGV[2]
local parts = redis.call('HMGET', 'ticket:' .. id, 'state', 'readers')
if not parts[1] then
  return nil
end
if not parts[2] then -- nobody was ever said to hold it
  return cancel(id, 'cancelled')
end
if tonumber(redis.call('HGET', held, id) or 0) <= 0 then
  return {'kept'}
end
if not redis.call('SET', 'left:' .. ARGV[3], '', 'NX', 'EX', 60) then
  return {'kept'} -- the reply to the first attempt was lost; what it claimed is claimed again by the sweep
end
if redis.call('HINCRBY', held, id, -1) <= 0 then
  redis.call('HDEL', held, id)
end
if redis.call('HINCRBY', 'ticket:' .. id, 'readers', -1) > 0 then
  return {'kept'}
end
return abandon(id)
