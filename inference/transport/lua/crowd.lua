-- How full a pool is: slots that are free, requests that wait, and whose queue is full ('', 'tenant' or 'key').
-- ARGV: pool, model, tenant, quota key, queue length limits of tenant and key or ''.
local bounds = {{'tenant', ARGV[5], 'queued:' .. ARGV[3]}, {'key', ARGV[6], 'queued:key:' .. ARGV[4]}}
return {free_slots(ARGV[1]), redis.call('ZCARD', 'waiting:' .. ARGV[1]), full_for(ARGV[1], ARGV[2], bounds)}
