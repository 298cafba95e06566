-- A new ticket joins its tenant's queue. Returns '', or 'tenant' or 'key': whose limit on those that wait is reached.
-- KEYS: ticket, idempotency record if it answers one. ARGV: id, pool, model id, tenant, key, seconds it may wait,
--       ttl seconds, queue length limit of the tenant or '', header, prompt, 1 where it counts towards that length, web that reads
--       or '', patience seconds, seconds it is kept after its end, question or '', and for the tenant's fair share:
--       weight, most slots or '', class, prompt tokens, most output tokens, group of sequences that are computed
--       together; quota key, queue length limit of the key or ''.
local id, pool, model, tenant = ARGV[1], ARGV[2], ARGV[3], ARGV[4]
if redis.call('EXISTS', KEYS[1]) == 1 then
  return '' -- the reply to the first attempt was lost
end
local queued = {['tenant'] = 'queued:' .. tenant, ['key'] = 'queued:key:' .. ARGV[22]}
local full = full_for(pool, model, {{'tenant', ARGV[8], queued.tenant}, {'key', ARGV[23], queued.key}})
if full ~= '' then
  return full
end
local now = time()
redis.call('HSET', KEYS[1], 'state', 'waiting', 'token', 0, 'pool', pool, 'model', model, 'tenant', tenant,
  'key', ARGV[5], 'created_at', text(now), 'header', ARGV[9], 'prompt', ARGV[10],
  'prompt_tokens', ARGV[19], 'quota_key', ARGV[22], 'max_tokens', ARGV[20], 'group', ARGV[21])
redis.call('HSET', KEYS[1], 'patience', ARGV[13], 'keep', ARGV[14])
if ARGV[15] ~= '' then
  redis.call('HSET', KEYS[1], 'question', ARGV[15])
end
if ARGV[12] ~= '' then
  redis.call('HSET', KEYS[1], 'readers', 1)
  redis.call('HSET', 'held:' .. ARGV[12], id, 1)
end
if KEYS[2] and redis.call('EXISTS', KEYS[2]) == 1 then
  redis.call('HSET', KEYS[2], 'admitted', 1)
end
redis.call('EXPIRE', KEYS[1], ARGV[7])
redis.call('HSET', 'share:' .. tenant, 'weight', ARGV[16], 'slots', ARGV[17], 'class', ARGV[18])
redis.call('EXPIRE', 'share:' .. tenant, math.max(FORGET_SECONDS, ARGV[7]))
if not waits(pool, tenant) then
  set_had(pool, tenant, math.max(had(pool, tenant), clock(pool))) -- who was idle has saved nothing up
end
redis.call('ZADD', 'queue:' .. pool .. ':' .. model .. ':' .. tenant, text(now), id)
update_head(pool, model, tenant)
redis.call('ZADD', 'waiting:' .. pool, text(now + tonumber(ARGV[6])), id)
if ARGV[11] == '1' then
  redis.call('SADD', queued.tenant, id)
  redis.call('SADD', queued.key, id)
end
redis.call('SADD', 'of:key:' .. ARGV[5], id)
redis.call('SADD', 'of:tenant:' .. tenant, id)
-- A ticket that runs out while nobody sweeps stays in these: they end with the last of theirs.
for _, name in ipairs({'of:key:' .. ARGV[5], 'of:tenant:' .. tenant, queued.tenant, queued.key}) do
  if redis.call('TTL', name) < tonumber(ARGV[7]) then
    redis.call('EXPIRE', name, ARGV[7])
  end
end
redis.call('SADD', 'pools', pool)
return ''
