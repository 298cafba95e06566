-- Take back a ticket that was put and that no worker has seen: its request was refused after all. Returns 1 if it did.
-- ARGV: id.
local id = ARGV[1]
local parts = redis.call('HMGET', 'ticket:' .. id, 'state', 'pool', 'model', 'tenant', 'key')
if parts[1] ~= 'waiting' then
  return 0
end
unqueue(id, parts[2], parts[3], parts[4])
redis.call('SREM', 'of:key:' .. parts[5], id)
redis.call('SREM', 'of:tenant:' .. parts[4], id)
dismiss(id)
redis.call('DEL', 'ticket:' .. id)
return 1
