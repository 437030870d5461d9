/* Ranks that compute one model together, on one node: CPU library only.
 *
 * The ranks are processes, one thread of each at a time in a collective, and meet in a mapped file. All make the same
 * calls in the same order. Sums are of float32, in the order of ranks, so that they do not depend on who came first or
 * on what else is in the batch. Every wait ends: when the others have come, at its deadline, or by an abort; the last
 * two return QUIRE_COMMUNICATION_FAILED, on every rank and for every later call.
 */
#ifndef QUIRE_COMMUNICATOR_H
#define QUIRE_COMMUNICATOR_H

#include "quire.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct QuireCommunicatorParams {
    uint32_t size;
    uint32_t abi_version;
    const char* path;        /* of the file, in memory (/dev/shm): rank 0 makes it; it is removed once all have joined */
    int64_t timeout_ns;      /* of one wait for the others in a collective */
    int64_t join_timeout_ns; /* of the wait for them to join */
    const int32_t* cancelled; /* ends that wait once another thread makes it other than 0; NULL is never */
    int32_t rank;
    int32_t world_size; /* 2 to 64 */
} QuireCommunicatorParams;

typedef struct QuireCommunicator QuireCommunicator;

/* Join the others; returns when all have. */
QUIRE_API int quire_communicator_join(const QuireCommunicatorParams* params, QuireCommunicator** communicator);

/* Any thread, at any time before leaving. */
QUIRE_API void quire_communicator_abort(QuireCommunicator* communicator);
QUIRE_API void quire_communicator_leave(QuireCommunicator* communicator);

/* data[i] becomes the sum of all ranks' data[i]. */
QUIRE_API int quire_all_reduce(QuireCommunicator* communicator, float* data, int64_t count);

/* Rank 0's `gathered` becomes each rank's `count` values, in the order of ranks; unused elsewhere. */
QUIRE_API int quire_gather(QuireCommunicator* communicator, const float* data, int64_t count, float* gathered);

#ifdef __cplusplus
}
#endif

#endif /* QUIRE_COMMUNICATOR_H */
