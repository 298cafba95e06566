-- A new ticket joins its tenant's queue. Returns 1, or 0 where the tenant's queue is full.
-- KEYS: ticket. ARGV: id, pool, model id, tenant, key, seconds it may wait, ttl seconds, queue length limit or '',
--       header, prompt.
local id, pool, model, tenant = ARGV[1], ARGV[2], ARGV[3], ARGV[4]
if redis.call('EXISTS', KEYS[1]) == 1 then
  return 1 -- the reply to the first attempt was lost
end
-- The limit counts tickets that wait for a slot: while a worker has one free, nothing waits.
if ARGV[8] ~= '' and redis.call('SCARD', 'queued:' .. tenant) >= tonumber(ARGV[8])
  and free_slots(pool) <= redis.call('ZCARD', 'waiting:' .. pool) then
  return 0
end
local now = time()
redis.call('HSET', KEYS[1], 'state', 'waiting', 'token', 0, 'pool', pool, 'model', model, 'tenant', tenant,
  'key', ARGV[5], 'created_at', text(now), 'header', ARGV[9], 'prompt', ARGV[10])
redis.call('EXPIRE', KEYS[1], ARGV[7])
redis.call('ZADD', 'queue:' .. pool .. ':' .. model .. ':' .. tenant, text(now), id)
redis.call('ZADD', 'heads:' .. pool .. ':' .. model, 'LT', text(now), tenant)
redis.call('ZADD', 'waiting:' .. pool, text(now + tonumber(ARGV[6])), id)
redis.call('SADD', 'queued:' .. tenant, id)
redis.call('SADD', 'of:key:' .. ARGV[5], id)
redis.call('SADD', 'of:tenant:' .. tenant, id)
redis.call('SADD', 'pools', pool)
return 1
