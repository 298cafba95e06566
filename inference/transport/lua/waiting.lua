-- What waits for some models of a pool, and who sees to it. A worker asks before it loads, so that of those that could
-- one does. ARGV: pool, worker, then for each model its id and what it is to this worker:
--   held    in its memory, or on its way there            able   it would load the model now
--   later   it would have to end others' work first       unable it cannot load it
-- Returns for each: waiting tickets, seconds that the oldest waits, and what follows:
--   mine    this worker holds it from now on              others another does, or may
--   none    nobody can: whoever reads this ends the tickets
local pool, worker = ARGV[1], ARGV[2]

-- Members of a hash of workers that live, without this one.
local function others_of(name)
  local found = {}
  for _, other in ipairs(redis.call('HKEYS', name)) do
    if other ~= worker then
      if redis.call('EXISTS', 'worker:' .. other) == 1 then
        found[#found + 1] = other
      else
        redis.call('HDEL', name, other)
      end
    end
  end
  return found
end

local answers = {}
for i = 3, #ARGV, 2 do
  local model, mark = ARGV[i], ARGV[i + 1]
  local holders = 'holders:' .. pool .. ':' .. model
  local number, since = 0, 0
  for _, queue in ipairs({pool, pool .. '~batch'}) do
    local oldest = 'oldest:' .. queue .. ':' .. model
    for j, tenant in ipairs(redis.call('ZRANGE', oldest, 0, 63)) do
      number = number + redis.call('ZCARD', 'queue:' .. queue .. ':' .. model .. ':' .. tenant)
      if j == 1 then
        since = math.max(since, time() - tonumber(redis.call('ZSCORE', oldest, tenant)))
      end
    end
  end
  local verdict = 'others'
  if mark == 'held' then
    redis.call('HSET', holders, worker, 'held')
    verdict = 'mine'
  else
    local is_held = false
    for _, other in ipairs(others_of(holders)) do
      is_held = is_held or redis.call('HGET', holders, other) == 'held'
    end
    if mark == 'unable' then
      redis.call('HSET', holders, worker, 'unable')
      local all = true
      for _, other in ipairs(others_of('slots:' .. pool)) do
        all = all and redis.call('HGET', holders, other) == 'unable'
      end
      verdict = all and 'none' or 'others'
    elseif mark == 'able' and number > 0 and not is_held then
      redis.call('HSET', holders, worker, 'held')
      verdict = 'mine'
    else
      redis.call('HDEL', holders, worker)
    end
  end
  redis.call('EXPIRE', holders, 3600)
  answers[#answers + 1] = {number, text(since), verdict}
end
return answers
