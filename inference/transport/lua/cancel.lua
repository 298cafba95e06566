-- Cancel a request, whoever reads it. Returns as `cancel` of common.lua. ARGV: id, reason.
return cancel(ARGV[1], ARGV[2])
