/* The balancer's core: which replica holds which prefix, the order in which replicas come free, and the choice of the
 * cheapest. libquire_balancer.so; app/balancer/native.py calls it, app/balancer/policy.py is its reference.
 *
 * A slot is a small number that stands for a replica. Block hashes are 64 bits of the chained hash: two blocks that
 * share them would make a choice worse, never an answer wrong. Not thread-safe: the balancer's lock guards it.
 */
#ifndef QUIRE_BALANCER_H
#define QUIRE_BALANCER_H

#include <stdint.h>

#define QUIRE_BALANCER_ABI_VERSION 3
#define QUIRE_BALANCER_API __attribute__((visibility("default")))

#ifdef __cplusplus
extern "C" {
#endif

typedef struct QuireBalancer QuireBalancer;

/* What is known of each slot, the arrays of app/balancer/fleet.py, whose owner is the caller: it attaches them again
 * when they have moved. Times are of the caller's clock. quire_balancer_place writes where a pointer is not to const. */
typedef struct QuireFleetView {
    int64_t num_slots;
    double* free_at;                  /* when the prompts that are there will have been computed */
    const double* prefill_rates;      /* tokens a second */
    const double* decode_step_s;      /* of a step that only decodes */
    const double* decode_sequence_s;  /* that one more sequence adds to it */
    const double* cache_age_s;        /* how long the block that goes next has lain unused */
    const double* heard_at;
    int64_t* num_sequences;
    const int64_t* num_free_blocks;   /* less those that bookings take */
    const int64_t* num_empty_blocks;  /* of these, without content, less the same */
    int64_t* num_blocks_taken;        /* by bookings */
    const int64_t* block_sizes;
    const double* adapter_load_s;           /* until an adapter that is not there can be used */
    const int64_t* num_free_adapter_slots;  /* 0: before that, a request that has another one must end */
} QuireFleetView;

typedef struct QuirePlaceParams {
    const int64_t* chain; /* hashes of the prompt's full blocks */
    const uint8_t* among; /* a bit a slot, the lowest first: whom to choose from */
    int64_t chain_length;
    int64_t among_bytes;
    int64_t prompt_tokens;
    int64_t block_size; /* of the chain */
    int64_t output_tokens;
    int64_t num_sequences;
    double now;
    double crowding; /* the weights of app/balancer/cost.py */
    double reuse;
    double reuse_half_life_s;
    double silent_after_s; /* whom nobody heard for longer costs his silence */
    double mean_prefill_s; /* 0 makes no lanes */
    double hold_s;         /* a longer wait than this for queued prompts is not booked; infinity books any */
    int64_t reserves;      /* what is not booked for its wait still makes the slot's queue longer */
    const uint8_t* adapter_holders; /* as `among`: who has the request's adapter; NULL if it is for the base */
    int64_t adapter_bytes;
    /* The answer. */
    int64_t slot; /* -1: nobody to choose from */
    int64_t num_cached_blocks;
    double cost_s;
    int64_t is_booked;
    double wait_s;    /* for the prompts queued there */
    double prefill_s; /* of the prompt's uncached tokens */
    double free_at;   /* the slot's, before this request */
} QuirePlaceParams;

QUIRE_BALANCER_API int quire_balancer_abi_version(void);

/* NULL if there is no memory. */
QUIRE_BALANCER_API QuireBalancer* quire_balancer_create(void);
QUIRE_BALANCER_API void quire_balancer_destroy(QuireBalancer* balancer);

QUIRE_BALANCER_API void quire_balancer_attach(QuireBalancer* balancer, const QuireFleetView* view);

/* `index` 0: blocks that replicas have published; 1: blocks that booked prompts will store. Each returns 0, or -1 if
 * there is no memory. */
QUIRE_BALANCER_API int quire_balancer_store(QuireBalancer* balancer, int index, int64_t slot, const int64_t* hashes,
                                            int64_t count);
QUIRE_BALANCER_API int quire_balancer_remove(QuireBalancer* balancer, int index, int64_t slot, const int64_t* hashes,
                                             int64_t count);

/* Forget all blocks of a slot: looks through the whole index. */
QUIRE_BALANCER_API int quire_balancer_drop(QuireBalancer* balancer, int index, int64_t slot);

/* Blocks that anybody holds. */
QUIRE_BALANCER_API int64_t quire_balancer_num_blocks(const QuireBalancer* balancer, int index);

/* The order by time; a slot that is not in it is added. */
QUIRE_BALANCER_API int quire_balancer_order_put(QuireBalancer* balancer, int64_t slot, double free_at);
QUIRE_BALANCER_API int quire_balancer_order_remove(QuireBalancer* balancer, int64_t slot);

/* The first time in the order after `time`; infinity if there is none. */
QUIRE_BALANCER_API double quire_balancer_first_after(const QuireBalancer* balancer, double time);

/* Choose the cheapest and, unless the wait there is too long, book: the prompt's missing blocks are expected, its sequences and blocks
 * counted, its tokens queued, in the index, the order and the view. If there is no memory nothing of the view has
 * changed. */
QUIRE_BALANCER_API int quire_balancer_place(QuireBalancer* balancer, QuirePlaceParams* params);

#ifdef __cplusplus
}
#endif

#endif /* QUIRE_BALANCER_H */
