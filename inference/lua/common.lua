-- Shared by all scripts of this folder. Times are the server's, in seconds: hosts need not agree on the hour.
--   ticket:<id>                       hash: state (waiting, leased, claimed, done), token, header, prompt, pool, model, ...
--   queue:<pool>:<model>:<tenant>     waiting ids by arrival        heads:<pool>:<model>  tenants by their first arrival
--   waiting:<pool>                    waiting ids by deadline       queued:<tenant>       waiting ids of a tenant
--   worker:<id>, workers              heartbeats                    slots:<pool>          worker -> slots
--   leases:<worker>                   id -> token                   cancels:<worker>      ids it must cancel
--   claimed                           ids by the time somebody claimed them to end them
--   settlements, unsettled            what the ledger must still be told, and ids by the time they ended
--   of:key:<key>, of:tenant:<tenant>  ids that are not done
local function time()
  local t = redis.call('TIME')
  return tonumber(t[1]) + tonumber(t[2]) / 1000000
end

local function text(number)
  return string.format('%.6f', number)
end

-- The head of a tenant's queue has changed.
local function update_head(pool, model, tenant)
  local heads = 'heads:' .. pool .. ':' .. model
  local first = redis.call('ZRANGE', 'queue:' .. pool .. ':' .. model .. ':' .. tenant, 0, 0, 'WITHSCORES')
  if #first == 0 then
    redis.call('ZREM', heads, tenant)
  else
    redis.call('ZADD', heads, first[2], tenant)
  end
end

local function unqueue(id, pool, model, tenant)
  redis.call('ZREM', 'queue:' .. pool .. ':' .. model .. ':' .. tenant, id)
  redis.call('ZREM', 'waiting:' .. pool, id)
  redis.call('SREM', 'queued:' .. tenant, id)
  update_head(pool, model, tenant)
end

-- Whoever claims a ticket must end it; a claim that is dropped is claimed again by the sweep.
local function claim(id, why)
  local ticket = 'ticket:' .. id
  local token = redis.call('HINCRBY', ticket, 'token', 1)
  redis.call('HSET', ticket, 'state', 'claimed', 'why', why)
  redis.call('HDEL', ticket, 'prompt')
  redis.call('ZADD', 'claimed', text(time()), id)
  return {id, why, redis.call('HGET', ticket, 'header'), token}
end

-- Slots of a pool's live workers that hold no lease.
local function free_slots(pool)
  local free = 0
  local slots = redis.call('HGETALL', 'slots:' .. pool)
  for i = 1, #slots, 2 do
    if redis.call('EXISTS', 'worker:' .. slots[i]) == 1 then
      free = free + math.max(0, tonumber(slots[i + 1]) - redis.call('HLEN', 'leases:' .. slots[i]))
    end
  end
  return free
end

