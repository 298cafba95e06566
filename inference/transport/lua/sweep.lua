-- Claim what nobody serves any more, for the caller to end: leases of dead workers, tickets that waited too long,
-- claims whose claimer died. Cancel what nobody reads any more. Two sweepers never claim the same.
-- ARGV: most to claim, seconds after which a claim counts as dropped, milliseconds between two rings of a pool.
-- Returns {claims, rings}: claims are {id, why, header, token}; rings are {pool, number} of doorbells that seem lost.
local MOST_BELLS = 1000
local now, most = time(), tonumber(ARGV[1])
local claims, rings = {}, {}
local can_write, is_trusted = pcall(hear) -- a full server still ends what needs no memory
local function those_who_beat(names)
  return can_write and is_trusted and redis.call('SMEMBERS', names) or {}
end

local function take(id, why)
  if redis.call('HEXISTS', 'ticket:' .. id, 'header') == 1 then
    claims[#claims + 1] = claim(id, why)
  else
    redis.call('ZREM', 'claimed', id)
  end
end

local dropped = now - tonumber(ARGV[2])
for _, id in ipairs(redis.call('ZRANGE', 'claimed', '-inf', text(dropped), 'BYSCORE', 'LIMIT', 0, most)) do
  take(id, redis.call('HGET', 'ticket:' .. id, 'why') or 'worker_lost')
end

for _, worker in ipairs(those_who_beat('workers')) do
  if redis.call('EXISTS', 'worker:' .. worker) == 0 then
    local leases = redis.call('HKEYS', 'leases:' .. worker)
    for i = 1, math.min(#leases, most - #claims) do
      local held = redis.call('HMGET', 'ticket:' .. leases[i], 'state', 'worker')
      if held[1] == 'leased' and held[2] == worker then
        take(leases[i], 'worker_lost')
      end
      redis.call('HDEL', 'leases:' .. worker, leases[i])
    end
    if redis.call('EXISTS', 'leases:' .. worker) == 0 then
      redis.call('SREM', 'workers', worker)
      redis.call('DEL', 'cancels:' .. worker)
    end
  end
end

local function stop(outcome)
  if outcome and outcome[1] == 'waiting' then
    claims[#claims + 1] = outcome[2]
  end
end

for _, web in ipairs(those_who_beat('webs')) do
  if redis.call('EXISTS', 'web:' .. web) == 0 then
    local held = redis.call('HGETALL', 'held:' .. web)
    for i = 1, math.min(#held, 2 * (most - #claims)), 2 do
      local id = held[i]
      redis.call('HDEL', 'held:' .. web, id)
      if redis.call('HEXISTS', 'ticket:' .. id, 'readers') == 1
        and redis.call('HINCRBY', 'ticket:' .. id, 'readers', -tonumber(held[i + 1])) <= 0 then
        stop(abandon(id))
      end
    end
    if redis.call('EXISTS', 'held:' .. web) == 0 then
      redis.call('SREM', 'webs', web)
    end
  end
end

local due = math.max(0, most - #claims)
for _, id in ipairs(redis.call('ZRANGE', 'orphans', '-inf', text(now), 'BYSCORE', 'LIMIT', 0, due)) do
  redis.call('ZREM', 'orphans', id)
  stop(cancel(id, 'cancelled'))
end

for _, pool in ipairs(redis.call('SMEMBERS', 'pools')) do
  local waiting = 'waiting:' .. pool
  local room = math.max(0, most - #claims)
  for _, id in ipairs(redis.call('ZRANGE', waiting, '-inf', text(now), 'BYSCORE', 'LIMIT', 0, room)) do
    local parts = redis.call('HMGET', 'ticket:' .. id, 'state', 'model', 'tenant')
    if parts[1] == 'waiting' then
      unqueue(id, pool, parts[2], parts[3])
      take(id, 'queue_timeout')
    else
      redis.call('ZREM', waiting, id)
    end
  end
  for _, worker in ipairs(redis.call('HKEYS', 'slots:' .. pool)) do
    if redis.call('SISMEMBER', 'workers', worker) == 0 then
      redis.call('HDEL', 'slots:' .. pool, worker)
    end
  end
  -- Celery's messages (its prefix is in llmsite/config.py) are all alike: a few are as good as many. Where no worker
  -- lives nobody takes them, and one that starts rings for itself.
  local bells = 'llmsite:' .. pool
  if redis.call('EXISTS', 'slots:' .. pool) == 1 then
    redis.pcall('LTRIM', bells, 0, MOST_BELLS - 1)
  else
    redis.call('DEL', bells)
  end
  -- Who neither waits nor is ahead of the clock would be put level with it: there is nothing to remember.
  for _, tenant in ipairs(redis.call('ZRANGE', 'had:' .. pool, '-inf', text(clock(pool)), 'BYSCORE', 'LIMIT', 0, most)) do
    if not waits(pool, tenant) then
      redis.call('ZREM', 'had:' .. pool, tenant)
    end
  end
  local number = math.min(redis.call('ZCARD', waiting), free_slots(pool))
  if number > 0 and redis.call('SET', 'ring:' .. pool, 1, 'NX', 'PX', ARGV[3]) then
    rings[#rings + 1] = {pool, number}
  end
end
return {claims, rings}
