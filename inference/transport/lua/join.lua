-- One more reader of a request that has not ended. Returns 1, or 0 where there is nothing to wait for.
-- Sent again, it counts once. ARGV: id, web, id of the reader.
local ticket = 'ticket:' .. ARGV[1]
local state = redis.call('HGET', ticket, 'state')
if state ~= 'waiting' and state ~= 'leased' then
  return 0
end
if not redis.call('SET', 'reader:' .. ARGV[3], '', 'NX', 'EX', 60) then
  return 1 -- the reply to the first attempt was lost
end
redis.call('HINCRBY', ticket, 'readers', 1)
redis.call('HINCRBY', 'held:' .. ARGV[2], ARGV[1], 1)
redis.call('ZREM', 'orphans', ARGV[1])
return 1
