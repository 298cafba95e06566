-- Events of one sequence join its stream, if the writer still holds the ticket. With the last event, in the same step,
-- goes what the ledger must be told: a request that has ended is settled, whatever dies next.
-- Returns 1; 0 where the token is stale (another holds the ticket, or nobody); 2 where the events are there already.
-- KEYS: ticket, stream. ARGV: id, token, number of the last event or 0, ttl seconds, longest stream,
--       outcome or '' if more events follow, events...
local held = redis.call('HMGET', KEYS[1], 'token', 'sent', 'state', 'worker', 'tenant', 'key')
if held[1] ~= ARGV[2] then
  return 0
end
local number = tonumber(ARGV[3])
if held[3] == 'done' or (number > 0 and held[2] and number <= tonumber(held[2])) then
  return 2 -- the reply to an earlier attempt was lost
end
for i = 7, #ARGV do
  redis.call('XADD', KEYS[2], 'MAXLEN', '~', ARGV[5], '*', 'e', ARGV[i])
end
redis.call('EXPIRE', KEYS[2], ARGV[4])
if ARGV[6] == '' then
  redis.call('HSET', KEYS[1], 'sent', number)
  return 1
end
local id = ARGV[1]
redis.call('HSET', 'settlements', id, redis.call('HGET', KEYS[1], 'header') .. '\n' .. ARGV[6])
redis.call('ZADD', 'unsettled', text(time()), id)
redis.call('HSET', KEYS[1], 'state', 'done')
redis.call('HDEL', KEYS[1], 'header', 'prompt')
redis.call('EXPIRE', KEYS[1], ARGV[4])
redis.call('ZREM', 'claimed', id)
redis.call('SREM', 'of:key:' .. held[6], id)
redis.call('SREM', 'of:tenant:' .. held[5], id)
if held[4] then
  redis.call('HDEL', 'leases:' .. held[4], id)
  redis.call('SREM', 'cancels:' .. held[4], id)
end
return 1
