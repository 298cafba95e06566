-- One request enters: places, streams and tokens of its tenant and its key, all or nothing. Time is the server's.
-- KEYS: tokens of tenant, tokens of key, places of tenant, places of key, streams of tenant, streams of key.
-- ARGV: request id ('' only looks at the tokens), tokens, seconds until the place frees itself, then limits ('' is none):
--       tokens a minute of tenant, of key, places of tenant, of key, streams of tenant, of key;
--       '1' for a stream; '1' to check all of it and take nothing.
-- Returns verdict ('ok', 'tokens', 'places', 'streams'), 'tenant' or 'key', the limit, tokens that are there, seconds
-- until enough of them (verdict tokens) or all of them (verdict ok) are there again.
local clock = redis.call('TIME')
local now = tonumber(clock[1]) + tonumber(clock[2]) / 1000000
local id, tokens, ttl = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3])
local whose = {'tenant', 'key'}
local looks = id == ''
local streams = ARGV[10] == '1'
local takes = not looks and ARGV[11] ~= '1'
local again = false

if not looks then
  for i = 3, 6 do
    redis.call('ZREMRANGEBYSCORE', KEYS[i], '-inf', now)
  end
  again = redis.call('ZSCORE', KEYS[3], id) ~= false
  for i = 1, 4 do
    local limit = tonumber(ARGV[5 + i])
    if limit and not again and (i < 3 or streams) and redis.call('ZCARD', KEYS[i + 2]) >= limit then
      return {i < 3 and 'places' or 'streams', whose[(i - 1) % 2 + 1], string.format('%.0f', limit), '0', '0'}
    end
  end
end

-- The bucket that is emptiest in relation to what is asked; a refusal names the one that takes longest.
local levels, tightest, refused = {}, nil, nil
for i = 1, 2 do
  local limit = tonumber(ARGV[3 + i])
  if limit then
    local level = limit
    local row = redis.call('HMGET', KEYS[i], 'level', 'at')
    if row[1] then
      level = math.min(limit, tonumber(row[1]) + math.max(0, now - tonumber(row[2])) * limit / 60)
    end
    levels[i] = level
    if not looks and not again and level < tokens then
      local wait = limit > 0 and (tokens - level) * 60 / limit or 0
      if not refused or wait > refused.wait or limit < tokens then
        refused = {whose = whose[i], limit = limit, level = level, wait = wait}
      end
    end
  end
end
if refused then
  return {'tokens', refused.whose, string.format('%.0f', refused.limit),
    string.format('%.0f', math.floor(math.max(0, refused.level))), string.format('%.3f', refused.wait)}
end

for i = 1, 2 do
  local limit = tonumber(ARGV[3 + i])
  if limit then
    if takes and not again then
      levels[i] = levels[i] - tokens
      redis.call('HSET', KEYS[i], 'level', string.format('%.6f', levels[i]), 'at', string.format('%.6f', now),
        'limit', string.format('%.0f', limit))
      redis.call('EXPIRE', KEYS[i], 120)
    end
    if not tightest or levels[i] < tightest.level then
      tightest = {whose = whose[i], limit = limit, level = levels[i]}
    end
  end
end
if takes and not again then
  for i = 3, streams and 6 or 4 do
    redis.call('ZADD', KEYS[i], string.format('%.6f', now + ttl), id)
    if redis.call('TTL', KEYS[i]) < ttl + 1 then
      redis.call('EXPIRE', KEYS[i], ttl + 1)
    end
  end
end
if not tightest then
  return {'ok', '', '', '', ''}
end
local full = tightest.limit > 0 and (tightest.limit - tightest.level) * 60 / tightest.limit or 0
return {'ok', tightest.whose, string.format('%.0f', tightest.limit),
  string.format('%.0f', math.floor(math.max(0, tightest.level))), string.format('%.3f', full)}
