-- Events of one sequence join its stream, if the writer still holds the ticket.
-- Returns 1; 0 where the fencing token is stale (another holds the ticket, or nobody); 2 where they were there already.
-- KEYS: ticket, stream. ARGV: id, token, number of the last event or 0, ttl seconds, 1 if final, longest stream, events...
local held = redis.call('HMGET', KEYS[1], 'token', 'sent', 'worker', 'state')
if held[1] ~= ARGV[2] then
  return 0
end
local number = tonumber(ARGV[3])
if held[4] == 'done' or (number > 0 and held[2] and number <= tonumber(held[2])) then
  return 2 -- the reply to an earlier attempt was lost
end
for i = 7, #ARGV do
  redis.call('XADD', KEYS[2], 'MAXLEN', '~', ARGV[6], '*', 'e', ARGV[i])
end
redis.call('EXPIRE', KEYS[2], ARGV[4])
if ARGV[5] == '1' then
  redis.call('HSET', KEYS[1], 'state', 'done', 'sent', number)
  redis.call('HDEL', KEYS[1], 'prompt', 'header')
  redis.call('EXPIRE', KEYS[1], ARGV[4])
  redis.call('ZREM', 'claimed', ARGV[1])
  if held[3] then
    redis.call('HDEL', 'leases:' .. held[3], ARGV[1])
    redis.call('SREM', 'cancels:' .. held[3], ARGV[1])
  end
else
  redis.call('HSET', KEYS[1], 'sent', number)
end
return 1
