-- A web process lives. ARGV: web, ttl milliseconds.
redis.call('SET', 'web:' .. ARGV[1], '', 'PX', ARGV[2])
redis.call('SADD', 'webs', ARGV[1])
hear()
return 1
