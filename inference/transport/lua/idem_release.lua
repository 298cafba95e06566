-- A request came to no answer. Its Idempotency-Key is free again if nothing is charged for it: it was not admitted, or it
-- has ended and cost nothing. Of several answers, which have no ticket of this id, the caller knows.
-- With ARGV[2] = 1 what it came to is not kept. Returns 1, or 0 where nothing was changed. KEYS: record.
-- ARGV: request id, 1 or 0.
local held = redis.call('HMGET', KEYS[1], 'request', 'state', 'admitted')
if held[1] ~= ARGV[1] or held[2] ~= 'open' then
  return 0
end
if ARGV[2] == '1' then
  redis.call('HSET', KEYS[1], 'state', 'lost')
  return 1
end
local ticket = redis.call('HMGET', 'ticket:' .. ARGV[1], 'state', 'charged')
if held[3] and ticket[1] and (ticket[1] ~= 'done' or tonumber(ticket[2] or 1) > 0) then
  return 0
end
redis.call('DEL', KEYS[1])
return 1
