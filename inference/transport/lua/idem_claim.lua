-- Who answers the POSTs of one Idempotency-Key? KEYS: record. ARGV: fingerprint, request id, web, ttl seconds,
-- seconds after which a claim that came to nothing is void.
-- Returns {'first'}; {'conflict'} for another body; {'running', id} where the ticket can be followed; {'waiting'} until
-- there is one; {'answered', id, status, headers, body}; {'lost', id} where the answer is not kept.
-- Record: print (of the body), request, web, at, state (open, answered, lost), admitted (something may be charged).
local record = KEYS[1]
local held = redis.call('HMGET', record, 'print', 'request', 'web', 'state', 'admitted', 'at')
if held[1] and held[1] ~= ARGV[1] then
  return {'conflict'}
end
if held[4] == 'answered' then
  local answer = redis.call('HMGET', record, 'status', 'headers', 'body')
  return {'answered', held[2], answer[1], answer[2], answer[3]}
end
if held[4] == 'lost' then
  return {'lost', held[2]}
end
local now = time()
if held[1] then
  if redis.call('HEXISTS', 'ticket:' .. held[2], 'question') == 1 then
    return {'running', held[2]}
  end
  if redis.call('EXISTS', 'web:' .. held[3]) == 1 and now - tonumber(held[6]) < tonumber(ARGV[5]) then
    return {'waiting'}
  end
  if held[5] then -- whoever answered it died, and it may have been charged
    redis.call('HSET', record, 'state', 'lost')
    return {'lost', held[2]}
  end
end
redis.call('HSET', record, 'print', ARGV[1], 'request', ARGV[2], 'web', ARGV[3], 'state', 'open', 'at', text(now))
redis.call('EXPIRE', record, ARGV[4])
return {'first'}
