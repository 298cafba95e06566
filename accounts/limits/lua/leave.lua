-- One request leaves: its places are freed and unused tokens go back. Returns 1, or 0 where it had no place any more.
-- KEYS: tokens of tenant, tokens of key, places of tenant, places of key, streams of tenant, streams of key.
-- ARGV: request id ('': tokens alone that were taken for requests which never came), unused tokens.
local left = redis.call('ZREM', KEYS[3], ARGV[1])
for i = 4, 6 do
  redis.call('ZREM', KEYS[i], ARGV[1])
end
if left == 0 and ARGV[1] ~= '' then
  return 0
end
local unused = tonumber(ARGV[2])
if unused > 0 then
  for i = 1, 2 do
    local row = redis.call('HMGET', KEYS[i], 'level', 'limit')
    if row[1] then
      local level = math.min(tonumber(row[2]), tonumber(row[1]) + unused)
      redis.call('HSET', KEYS[i], 'level', string.format('%.6f', level))
    end
  end
end
return 1
