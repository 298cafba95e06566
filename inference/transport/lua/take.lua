-- A waiting ticket among some models of a pool is leased to a worker: the next one in the order of fair share.
-- The prompt leaves Redis here: what a worker has had is never handed to a second one.
--
-- Every tenant has had so many weighted tokens (had:<pool>). The ticket is the first one of the tenant that has had
-- least, among those that hold fewer slots of the model than their share while somebody else waits for it, and never
-- more than their plan allows. It is charged as long as its answers usually are, and corrected when it ends. An idle
-- tenant comes back level with whoever was served last (put.lua), so nothing can be saved up. (Start-time fair queueing
-- of Goyal, Vin and Cheng after Demers, Keshav and Shenker, with the virtual token counters of Sheng et al., "Fairness
-- in Serving Large Language Models", 2024.)
--
-- Of tenants that are nearly level, one goes first whose sequences are computed together with what runs already; and
-- every PASSED_AT_MOST-th ticket is the oldest one of all that may go, whatever its tenant has had: so each waits for a
-- bounded number of others, also where new tenants never cease to come.
--
-- ARGV: pool, worker, order (fair or fifo), number of models with a free slot, these models, number of groups that run
--       on this worker, these groups, then model and tenant in turn of full models' sequences that could be parked.
-- Returns nil, or {id, header, prompt, token, class, seconds it waited, tenant of whom a sequence must be parked or ''}.
local PASSED_AT_MOST = 32
local NEARLY_LEVEL = 512 -- weighted tokens
local UNKNOWN_LENGTH = 128 -- tokens of a tenant's first answer
local MOST_LOOKED_AT = 64

local pool, worker, order = ARGV[1], ARGV[2], ARGV[3]
local home = string.gsub(pool, '~batch$', '') -- lines of batches run in the slots of the pool that they wait behind
local models, groups, parkable = {}, {}, {}
local at = 5
for i = at, at + ARGV[4] - 1 do
  models[#models + 1] = ARGV[i]
end
at = at + ARGV[4]
for i = at + 1, at + ARGV[at] do
  groups[ARGV[i]] = true
end
for i = at + ARGV[at] + 1, #ARGV, 2 do
  parkable[ARGV[i]] = parkable[ARGV[i]] or {}
  table.insert(parkable[ARGV[i]], ARGV[i + 1])
end

-- Who holds what

-- For one model: its slots on live workers, how many of them are free, and how many each tenant holds.
-- held_in_pool: how many each tenant holds of all models.
local function holdings(model)
  local found = {slots = 0, free = 0, held = {}, held_in_pool = {}}
  local slots = redis.call('HGETALL', 'slots:' .. home)
  for i = 1, #slots, 2 do
    if redis.call('EXISTS', 'worker:' .. slots[i]) == 1 then
      local own = tonumber(redis.call('HGET', 'slots:' .. home .. ':' .. model, slots[i]) or 0)
      local used = 0
      for _, lease in ipairs(redis.call('HVALS', 'leases:' .. slots[i])) do
        local tenant, of = string.match(lease, '^(%S+) (%S+)$')
        if tenant then
          found.held_in_pool[tenant] = (found.held_in_pool[tenant] or 0) + 1
          if of == model then
            used = used + 1
            found.held[tenant] = (found.held[tenant] or 0) + 1
          end
        end
      end
      found.slots = found.slots + own
      found.free = found.free + math.max(0, own - used)
    end
  end
  return found
end

local shares = {}
local function share_of(tenant)
  if not shares[tenant] then
    local values = redis.call('HMGET', 'share:' .. tenant, 'weight', 'slots', 'class', 'length')
    shares[tenant] = {
      weight = tonumber(values[1] or 1),
      slots = tonumber(values[2] or '') or math.huge,
      class = values[3] or '',
      length = tonumber(values[4] or UNKNOWN_LENGTH),
    }
  end
  return shares[tenant]
end

-- Who waits

local function comes_before(one, other)
  if one.had ~= other.had then
    return one.had < other.had
  end
  return one.arrival < other.arrival
end

-- Tenants that wait for a model, those that have had least first; of equals, who came first.
local function waiting_for(model, holding)
  local place = pool .. ':' .. model
  local list, seen = {}, {}
  -- As many as there are slots may be kept back by their caps; then one is left that is not.
  local most = math.max(MOST_LOOKED_AT, holding.slots + 1)
  for _, order in ipairs({'heads:', 'oldest:'}) do
    for _, tenant in ipairs(redis.call('ZRANGE', order .. place, 0, most)) do
      if not seen[tenant] then
        seen[tenant] = true
        list[#list + 1] = {
          tenant = tenant,
          model = model,
          had = tonumber(redis.call('ZSCORE', 'heads:' .. place, tenant)),
          arrival = tonumber(redis.call('ZSCORE', 'oldest:' .. place, tenant)),
        }
      end
    end
  end
  table.sort(list, comes_before)
  return list
end

-- How many slots of the model a tenant may hold while others wait for it, not yet a whole number: by the weights of all
-- who hold one or wait. Where more wait than are looked at, everybody's share is about one.
local function measure_shares(waiting, holding)
  local total, seen = 0, {}
  for tenant in pairs(holding.held) do
    seen[tenant] = true
    total = total + share_of(tenant).weight
  end
  for _, each in ipairs(waiting) do
    if not seen[each.tenant] then
      seen[each.tenant] = true
      total = total + share_of(each.tenant).weight
    end
  end
  return function(tenant)
    return math.max(1, holding.slots * share_of(tenant).weight / total)
  end
end

-- What may go: {list, by model}. Those below their share, else all whom their plan lets.
local function who_may_go()
  local below, all = {}, {}
  for _, model in ipairs(models) do
    local holding = holdings(model)
    local waiting = waiting_for(model, holding)
    local share = measure_shares(waiting, holding)
    for _, each in ipairs(waiting) do
      if (holding.held_in_pool[each.tenant] or 0) >= share_of(each.tenant).slots then
        if each.had < clock(pool) then
          set_had(pool, each.tenant, clock(pool)) -- what its own plan kept it from is no credit
        end
      else
        all[#all + 1] = each
        if holding.slots == 0 or (holding.held[each.tenant] or 0) < math.ceil(share(each.tenant)) then
          below[#below + 1] = each
        end
      end
    end
  end
  local list = #below > 0 and below or all
  table.sort(list, comes_before)
  return list
end

local function oldest_of(list, model)
  local oldest
  for _, each in ipairs(list) do
    if (not model or each.model == model) and (not oldest or each.arrival < oldest.arrival) then
      oldest = each
    end
  end
  return oldest
end

-- The choice

local function first_id(each)
  return redis.call('ZRANGE', 'queue:' .. pool .. ':' .. each.model .. ':' .. each.tenant, 0, 0)[1]
end

-- Counts how often the oldest of each model was passed over; the model for which that was too often, if one is.
local function model_passed_over()
  local longest, model = PASSED_AT_MOST - 1, nil
  for _, each in ipairs(models) do
    local passed = tonumber(redis.call('HGET', 'passed:' .. pool, each) or 0)
    if passed >= longest and redis.call('EXISTS', 'heads:' .. pool .. ':' .. each) == 1 then
      longest, model = passed, each
    end
  end
  return model
end

local function count_passed(list, chosen)
  local passed = 'passed:' .. pool
  for _, model in ipairs(models) do
    local oldest = oldest_of(list, model)
    if not oldest or (oldest.tenant == chosen.tenant and model == chosen.model) then
      redis.call('HDEL', passed, model)
    else
      redis.call('HINCRBY', passed, model, 1)
    end
  end
  redis.call('EXPIRE', passed, FORGET_SECONDS)
end

local function nearly_level_in_group(list)
  if not next(groups) then
    return nil
  end
  for _, each in ipairs(list) do
    if each.had > list[1].had + NEARLY_LEVEL then
      return nil
    end
    local id = first_id(each)
    if id and groups[redis.call('HGET', 'ticket:' .. id, 'group') or ''] then
      return each
    end
  end
end

local function advance_clock(to)
  if to > clock(pool) then
    redis.call('SET', 'clock:' .. pool, text(to), 'EX', FORGET_SECONDS)
  end
end

local function choose_fairly()
  local list = who_may_go()
  if #list == 0 then
    return nil
  end
  local overdue = model_passed_over()
  local chosen = overdue and oldest_of(list, overdue)
  if not chosen then
    chosen = nearly_level_in_group(list) or list[1]
    advance_clock(list[1].had)
  end
  count_passed(list, chosen)
  return chosen
end

local function choose_oldest()
  local list = {}
  for _, model in ipairs(models) do
    local first = redis.call('ZRANGE', 'oldest:' .. pool .. ':' .. model, 0, 0, 'WITHSCORES')
    if #first > 0 then
      list[#list + 1] = {tenant = first[1], model = model, arrival = tonumber(first[2])}
    end
  end
  return oldest_of(list)
end

-- No slot is free: who is well below its share may go where one of its model's sequences is parked, of a tenant that
-- holds more than its share here. Returns the choice and that tenant.
local function choose_with_parking()
  for model, tenants in pairs(parkable) do
    local holding = holdings(model)
    local waiting = waiting_for(model, holding)
    if #waiting > 0 and holding.free == 0 then
      local share = measure_shares(waiting, holding)
      local victim
      for _, tenant in ipairs(tenants) do
        local over = (holding.held[tenant] or 0) - math.ceil(share(tenant))
        if over > 0 and (not victim or over > victim.over) then
          victim = {tenant = tenant, over = over}
        end
      end
      for _, each in ipairs(victim and waiting or {}) do
        local allowed = (holding.held_in_pool[each.tenant] or 0) < share_of(each.tenant).slots
        if allowed and (holding.held[each.tenant] or 0) + 1 <= math.floor(share(each.tenant)) then
          advance_clock(waiting[1].had)
          return each, victim.tenant
        end
      end
    end
  end
end

-- The lease

local function charge(ticket, tenant)
  local share = share_of(tenant)
  local parts = redis.call('HMGET', ticket, 'prompt_tokens', 'max_tokens')
  local tokens = tonumber(parts[1] or 0) + OUTPUT_COST * math.min(tonumber(parts[2] or 0), share.length)
  local charged = tokens / share.weight
  redis.call('HSET', ticket, 'share_charged', text(charged), 'share_weight', share.weight)
  set_had(pool, tenant, had(pool, tenant) + charged)
end

-- nil where the ticket's hash has expired: nobody waits for it any more.
local function lease(chosen, parked_tenant)
  local id = first_id(chosen)
  if not id then
    update_head(pool, chosen.model, chosen.tenant)
    return nil
  end
  local ticket = 'ticket:' .. id
  unqueue(id, pool, chosen.model, chosen.tenant)
  local parts = redis.call('HMGET', ticket, 'state', 'header', 'prompt', 'created_at')
  if parts[1] ~= 'waiting' then
    return nil
  end
  charge(ticket, chosen.tenant)
  local token = redis.call('HINCRBY', ticket, 'token', 1)
  redis.call('HSET', ticket, 'state', 'leased', 'worker', worker)
  redis.call('HDEL', ticket, 'prompt')
  redis.call('HSET', 'leases:' .. worker, id, chosen.tenant .. ' ' .. chosen.model)
  local waited = text(time() - tonumber(parts[4]))
  return {id, parts[2], parts[3], token, share_of(chosen.tenant).class, waited, parked_tenant or ''}
end

while true do
  local chosen, parked_tenant
  if order == 'fifo' then
    chosen = choose_oldest()
  else
    chosen = choose_fairly()
    if not chosen then
      chosen, parked_tenant = choose_with_parking()
    end
  end
  if not chosen then
    return nil
  end
  local reply = lease(chosen, parked_tenant)
  if reply then
    return reply
  end
end
