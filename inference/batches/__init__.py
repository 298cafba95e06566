"""Files that tenants store, and batches of requests in them. The request's clock, at its slowest.

    upload -> files (disk) -> book.create -> validation (lines become rows) -> the feeder -> admission, as any request
                                                                                  |
              output and error file  <- finalizing <- book.record (rows)  <-------+

A line's request ids follow from its batch and number, so whoever feeds it again finds what was begun (redelivery.py).
Nothing here knows HTTP or a dialect; the feeder is in inference/api/openai, where the endpoints are.
"""
