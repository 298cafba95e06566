-- A kept completion or nil. KEYS: entry, index of the tenant.
local value = redis.call('GET', KEYS[1])
if value then
  redis.call('ZADD', KEYS[2], 'XX', text(time()), KEYS[1])
end
return value
