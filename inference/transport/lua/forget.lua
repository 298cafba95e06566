-- Drop a ticket that cannot be read: of another version, or not ours. Its reservation ends by itself. ARGV: id.
local id = ARGV[1]
local parts = redis.call('HMGET', 'ticket:' .. id, 'worker', 'tenant', 'key')
redis.call('ZREM', 'claimed', id)
if parts[1] then
  redis.call('HDEL', 'leases:' .. parts[1], id)
  redis.call('SREM', 'cancels:' .. parts[1], id)
end
if parts[2] and parts[3] then
  redis.call('SREM', 'of:tenant:' .. parts[2], id)
  redis.call('SREM', 'of:key:' .. parts[3], id)
end
dismiss(id)
redis.call('DEL', 'ticket:' .. id)
return 1
