-- A new ticket joins its tenant's queue in its pool. Returns 1, or 0 where the tenant's queue is full.
-- KEYS: ticket. ARGV: id, pool, tenant, created_at, queue_deadline_at, ttl seconds, queue length limit or '',
--       header, prompt, key id, model, stream flag.
local id, pool, tenant = ARGV[1], ARGV[2], ARGV[3]
if redis.call('EXISTS', KEYS[1]) == 1 then
  return 1 -- the reply to the first attempt was lost
end
local queue = 'queue:' .. pool .. ':' .. tenant
if ARGV[7] ~= '' and redis.call('ZCARD', queue) >= tonumber(ARGV[7]) then
  -- The limit counts tickets that wait for a slot: while a worker has one free, nothing waits.
  local free = -redis.call('ZCARD', 'waiting:' .. pool)
  local slots = redis.call('HGETALL', 'slots:' .. pool)
  for i = 1, #slots, 2 do
    if redis.call('EXISTS', 'worker:' .. slots[i]) == 1 then
      free = free + tonumber(slots[i + 1]) - redis.call('HLEN', 'leases:' .. slots[i])
    end
  end
  if free <= 0 then
    return 0
  end
end
redis.call('HSET', KEYS[1], 'state', 'waiting', 'token', 0, 'header', ARGV[8], 'prompt', ARGV[9],
  'pool', pool, 'tenant', tenant, 'key', ARGV[10], 'model', ARGV[11], 'created_at', ARGV[4])
redis.call('EXPIRE', KEYS[1], ARGV[6])
redis.call('ZADD', queue, ARGV[4], id)
redis.call('ZADD', 'heads:' .. pool, 'LT', ARGV[4], tenant)
redis.call('ZADD', 'waiting:' .. pool, ARGV[5], id)
redis.call('SADD', 'pools', pool)
return 1
