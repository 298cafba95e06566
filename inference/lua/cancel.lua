-- Cancel a request. Waiting: it is claimed by the caller, who must end it. Leased: its worker is told.
-- Returns {'waiting', claim}, {'running'}, {'done'}, or nil for an unknown id. ARGV: id, reason.
local id = ARGV[1]
local parts = redis.call('HMGET', 'ticket:' .. id, 'state', 'pool', 'model', 'tenant', 'worker')
if not parts[1] then
  return nil
end
if parts[1] == 'leased' then
  redis.call('SADD', 'cancels:' .. parts[5], id)
  redis.call('PUBLISH', 'cancel:' .. parts[5], id)
  return {'running'}
end
if parts[1] ~= 'waiting' then
  return {'done'}
end
unqueue(id, parts[2], parts[3], parts[4])
return {'waiting', claim(id, ARGV[2])}
