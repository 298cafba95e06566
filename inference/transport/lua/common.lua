-- Shared by all scripts of this folder. Times are the server's, in seconds: hosts need not agree on the hour.
--   ticket:<id>                       hash: state (waiting, leased, claimed, done), token, header, prompt, pool, model, ...
--   queue:<pool>:<model>:<tenant>     waiting ids by arrival        oldest:<pool>:<model> tenants by their first arrival
--   heads:<pool>:<model>              the same tenants by what they have had (fair share, see take.lua)
--   models:<pool>                     models that somebody waits for
--   had:<pool>, clock:<pool>          what each tenant has had, in weighted tokens; where the latest to be served stood
--   passed:<pool>                     model -> takes since its oldest ticket was taken
--   share:<tenant>                    weight, most slots, class, and how long its answers are on average
--   waiting:<pool>                    waiting ids by deadline       queued:<tenant>       waiting ids of a tenant
--   queued:key:<key>                  waiting ids of a key and what it was rotated from and to
--   counted:<either of these>         there for a second after its ids were looked at one by one
--   worker:<id>, workers              heartbeats                    slots:<pool>          worker -> slots
--   holders:<pool>:<model>            worker -> held (in its memory, or on its way there) or unable (it cannot load it)
--   slots:<pool>:<model>              worker -> slots of the model
--   leases:<worker>                   id -> 'tenant model'          cancels:<worker>      ids it must cancel
--   claimed                           ids by the time somebody claimed them to end them
--   settlements, unsettled            what the ledger must still be told, and ids by the time they ended
--   settling                          a process settles what others have left
--   of:key:<key>, of:tenant:<tenant>  ids that are not done
--   web:<id>, webs                    heartbeats of web processes   held:<web>            id -> its readers there
--   reader:<id>, left:<id>            one that was counted a moment ago, as it came and as it went
--   orphans                           ids that nobody reads, by the time at which they are cancelled
--   heard, doubted                    when somebody was last heard; there while heartbeats mean nothing
-- Of a ticket: readers (in all web processes), patience (seconds without a reader, below 0 for ever), keep (seconds
-- after its end), question (what was posted), charged (tokens, once it is done).
local function time()
  local t = redis.call('TIME')
  return tonumber(t[1]) + tonumber(t[2]) / 1000000
end

local function text(number)
  return string.format('%.6f', number)
end

-- Called with every heartbeat and every sweep, which come twice a second each. Where none was heard for a while, the
-- server stood still or could not write: heartbeats have run out that were sent. So nobody is taken for dead until all
-- have had the time to beat again. Returns whether a missing heartbeat means a dead process.
local SILENCE_SECONDS = 1
local DOUBT_SECONDS = 3

local function hear()
  local now, last = time(), redis.call('GET', 'heard')
  if last and now - tonumber(last) > SILENCE_SECONDS then
    redis.call('SET', 'doubted', '', 'EX', DOUBT_SECONDS)
  end
  redis.call('SET', 'heard', text(now))
  return redis.call('EXISTS', 'doubted') == 0
end

-- Fair share. What a tenant has had counts in tokens: one for each prompt token that was computed, OUTPUT_COST for each
-- that was generated, divided by its weight. A tenant that has not waited for a while is put level with the clock.
local OUTPUT_COST = 2
local FORGET_SECONDS = 3600

local function clock(pool)
  return tonumber(redis.call('GET', 'clock:' .. pool) or 0)
end

local function had(pool, tenant)
  return tonumber(redis.call('ZSCORE', 'had:' .. pool, tenant) or clock(pool))
end

local function set_had(pool, tenant, tokens)
  redis.call('ZADD', 'had:' .. pool, text(tokens), tenant)
  redis.call('EXPIRE', 'had:' .. pool, FORGET_SECONDS)
  for _, model in ipairs(redis.call('SMEMBERS', 'models:' .. pool)) do
    redis.call('ZADD', 'heads:' .. pool .. ':' .. model, 'XX', text(tokens), tenant)
  end
end

local function waits(pool, tenant)
  for _, model in ipairs(redis.call('SMEMBERS', 'models:' .. pool)) do
    if redis.call('ZSCORE', 'heads:' .. pool .. ':' .. model, tenant) then
      return true
    end
  end
  return false
end

-- The head of a tenant's queue has changed.
local function update_head(pool, model, tenant)
  local place = pool .. ':' .. model
  local first = redis.call('ZRANGE', 'queue:' .. place .. ':' .. tenant, 0, 0, 'WITHSCORES')
  if #first == 0 then
    redis.call('ZREM', 'heads:' .. place, tenant)
    redis.call('ZREM', 'oldest:' .. place, tenant)
    if redis.call('EXISTS', 'heads:' .. place) == 0 then
      redis.call('SREM', 'models:' .. pool, model)
    end
  else
    redis.call('SADD', 'models:' .. pool, model)
    redis.call('ZADD', 'oldest:' .. place, first[2], tenant)
    redis.call('ZADD', 'heads:' .. place, text(had(pool, tenant)), tenant)
  end
end

local function unqueue(id, pool, model, tenant)
  redis.call('ZREM', 'queue:' .. pool .. ':' .. model .. ':' .. tenant, id)
  redis.call('ZREM', 'waiting:' .. pool, id)
  redis.call('SREM', 'queued:' .. tenant, id)
  redis.call('SREM', 'queued:key:' .. (redis.call('HGET', 'ticket:' .. id, 'quota_key') or ''), id)
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

-- How many of these wait. A ticket whose hash ran out while nobody swept, as where the site stood still for a night, has
-- left its id behind: before a queue counts as full, such ids are looked for, once a second.
local function num_queued(queued, limit)
  local number = redis.call('SCARD', queued)
  if number > 0 and number >= limit and redis.call('SET', 'counted:' .. queued, '', 'NX', 'EX', 1) then
    for _, id in ipairs(redis.call('SMEMBERS', queued)) do
      if redis.call('HGET', 'ticket:' .. id, 'state') ~= 'waiting' then
        number = number - redis.call('SREM', queued, id)
      end
    end
  end
  return number
end

-- Of {whose, limit or '', set of waiting ids}, whose limit is reached; '' for nobody's. A limit counts tickets that wait
-- for a slot: while a worker has one free, nothing waits. For a model that nobody holds one may always wait where a
-- worker lives, else it would never be loaded.
local function full_for(pool, model, bounds)
  for _, bound in ipairs(bounds) do
    local whose, limit, queued = bound[1], bound[2] ~= '' and tonumber(bound[2]), bound[3]
    if limit == 0 and redis.call('HLEN', 'holders:' .. pool .. ':' .. model) == 0 then
      for _, worker in ipairs(redis.call('HKEYS', 'slots:' .. pool)) do
        limit = math.max(limit, redis.call('EXISTS', 'worker:' .. worker))
      end
    end
    if limit and free_slots(pool) <= redis.call('ZCARD', 'waiting:' .. pool) and num_queued(queued, limit) >= limit then
      return whose
    end
  end
  return ''
end

-- It has ended: no web process holds it any more.
local function dismiss(id)
  redis.call('ZREM', 'orphans', id)
  for _, web in ipairs(redis.call('SMEMBERS', 'webs')) do
    redis.call('HDEL', 'held:' .. web, id)
  end
end

-- Waiting: it is claimed by the caller, who must end it. Leased: its worker is told, and why.
-- Returns {'waiting', claim}, {'running'}, {'done'}, or nil for an unknown id.
local function cancel(id, why)
  local parts = redis.call('HMGET', 'ticket:' .. id, 'state', 'pool', 'model', 'tenant', 'worker')
  if not parts[1] then
    return nil
  end
  if parts[1] == 'leased' then
    redis.call('HSETNX', 'ticket:' .. id, 'why', why)
    redis.call('SADD', 'cancels:' .. parts[5], id)
    redis.call('PUBLISH', 'cancel:' .. parts[5], id .. ' ' .. why)
    return {'running'}
  end
  if parts[1] ~= 'waiting' then
    return {'done'}
  end
  unqueue(id, parts[2], parts[3], parts[4])
  return {'waiting', claim(id, why)}
end

-- Its last reader has gone: it is cancelled at once, later, or never.
local function abandon(id)
  local patience = tonumber(redis.call('HGET', 'ticket:' .. id, 'patience') or 0)
  if patience == 0 then
    return cancel(id, 'cancelled')
  end
  if patience > 0 then
    redis.call('ZADD', 'orphans', text(time() + patience), id)
  end
  return {'kept'}
end
