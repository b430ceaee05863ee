// BPE's three slow jobs in plain C: cutting text into words and counting them, learning merges, merging words.
//
// bpe.py says each job for one word, bpe_fast.py calls them here for whole texts and says the same in Python for where
// there is no compiler; tests hold all of them equal. Texts are valid UTF-8, which the callers have checked.

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

// --- cutting: where does the word that begins at s end? ---

enum { END, WHITE, LETTER, NUMBER, OTHER };              // classes of characters; END: no character is left

typedef struct {
    const uint8_t *classes;                              // of each code point
    int gpt4, digits;                                    // the pattern: GPT-2's or GPT-4's; digits that make a word
} Rule;

static inline int code_point(const uint8_t *s, int *length) {
    if (s[0] < 0x80) return *length = 1, s[0];
    if (s[0] < 0xe0) return *length = 2, (s[0] & 31) << 6 | (s[1] & 63);
    if (s[0] < 0xf0) return *length = 3, (s[0] & 15) << 12 | (s[1] & 63) << 6 | (s[2] & 63);
    return *length = 4, (s[0] & 7) << 18 | (s[1] & 63) << 12 | (s[2] & 63) << 6 | (s[3] & 63);
}

static inline int class_at(const Rule *rule, const uint8_t *s, const uint8_t *end, int *length) {
    return s < end ? rule->classes[code_point(s, length)] : END;
}

// The end of a run of one class, of at most `most` characters.
static inline const uint8_t *run(const Rule *rule, const uint8_t *s, const uint8_t *end, int class, int most) {
    int length;
    while (most-- && class_at(rule, s, end, &length) == class) s += length;
    return s;
}

// White space before a word: all of it but its last character, which the word may take: \s+(?!\S)|\s+
static const uint8_t *white(const Rule *rule, const uint8_t *s, const uint8_t *end) {
    const uint8_t *first = s, *last = s;
    int length;
    for (; class_at(rule, s, end, &length) == WHITE; s += length) last = s;
    return s < end && last > first ? last : s;
}

// The length of 's, 'd, 'm, 't, 'll, 've or 're, 0 for anything else.
static int contraction(const uint8_t *s, const uint8_t *end, int any_case) {
    if (end - s < 2 || s[0] != '\'') return 0;
    int fold = any_case ? 32 : 0, a = s[1] | fold, b = end - s > 2 ? s[2] | fold : 0;
    if (a == 's' || a == 'd' || a == 'm' || a == 't') return 2;
    if ((a == 'l' && b == 'l') || (a == 'v' && b == 'e') || (a == 'r' && b == 'e')) return 3;
    return any_case && s[1] == 0xc5 && s[2] == 0xbf ? 3 : 0;     // the long s of old prints is an s to (?i:
}

static const uint8_t *gpt2_word(const Rule *rule, const uint8_t *s, const uint8_t *end) {
    int length, n = contraction(s, end, 0);
    if (n) return s + n;
    const uint8_t *t = s + (*s == ' ');                  // one plain space in front of a run belongs to it
    int class = class_at(rule, t, end, &length);
    return class >= LETTER ? run(rule, t, end, class, -1) : white(rule, s, end);
}

static const uint8_t *gpt4_word(const Rule *rule, const uint8_t *s, const uint8_t *end) {
    int length = 1, next, n = contraction(s, end, 1);
    if (n) return s + n;
    int class = class_at(rule, s, end, &length), newline = *s == '\n' || *s == '\r';
    if (class == LETTER) return run(rule, s, end, LETTER, -1);
    if (class != NUMBER && !newline && class_at(rule, s + length, end, &next) == LETTER)
        return run(rule, s + length, end, LETTER, -1);   // any sign or space in front of letters belongs to them
    if (class == NUMBER) return run(rule, s, end, NUMBER, rule->digits);
    const uint8_t *t = s + (*s == ' ');
    if (class_at(rule, t, end, &next) == OTHER) {
        t = run(rule, t, end, OTHER, -1);
        while (t < end && (*t == '\n' || *t == '\r')) t++;
        return t;
    }
    const uint8_t *stop = s;                             // \s*[\r\n]+: white space as far as its last newline
    for (t = s; class_at(rule, t, end, &length) == WHITE; t += length)
        if (*t == '\n' || *t == '\r') stop = t + 1;
    return stop > s ? stop : white(rule, s, end);
}

static inline const uint8_t *word_end(const Rule *rule, const uint8_t *s, const uint8_t *end) {
    return rule->gpt4 ? gpt4_word(rule, s, end) : gpt2_word(rule, s, end);
}

// The first code point from byte `from` on whose class nobody has looked up yet, -1 for none. *at: where it stands.
int unknown(const uint8_t *classes, const uint8_t *text, int64_t from, int64_t n, int64_t *at) {
    int length = 1;
    for (int64_t i = from; i < n; i += length) {
        int code = code_point(text + i, &length);
        if (classes[code] == 255) return *at = i, code;
    }
    return -1;
}

// --- counting words ---

typedef struct { uint64_t hash; int64_t count, start; int32_t length; } Word;

typedef struct {
    int64_t n, n_bytes, room, room_bytes;                // words and their bytes, and for how many there is room
    Word *words;
    uint8_t *bytes;
    int32_t *slots;                                      // 2 · room of them: a word's number + 1, or 0
} Words;

// `memory`, if there was any: a trainer of gigabytes says what ended it.
static void *got(void *memory) {
    if (!memory) fputs("bpe.c: out of memory\n", stderr), exit(1);
    return memory;
}

void add_word(Words *w, const uint8_t *s, int32_t length, int64_t count) {
    uint64_t hash = 0;
    for (int i = 0; i < length; i++) hash = (hash ^ s[i]) * 0x9e3779b97f4a7c15u;
    hash ^= hash >> 32;
    if (w->n == w->room) {
        w->room = w->room ? 2 * w->room : 1 << 14;
        w->words = got(realloc(w->words, w->room * sizeof(Word)));
        free(w->slots);
        w->slots = got(calloc(2 * w->room, sizeof(int32_t)));
        for (int64_t i = 0, at; i < w->n; i++) {
            for (at = w->words[i].hash & (2 * w->room - 1); w->slots[at]; at = (at + 1) & (2 * w->room - 1)) {}
            w->slots[at] = i + 1;
        }
    }
    int64_t at = hash & (2 * w->room - 1);
    for (; w->slots[at]; at = (at + 1) & (2 * w->room - 1)) {
        Word *word = w->words + w->slots[at] - 1;
        if (word->hash == hash && word->length == length && !memcmp(w->bytes + word->start, s, length)) {
            word->count += count;
            return;
        }
    }
    while (w->n_bytes + length > w->room_bytes) {
        w->room_bytes = w->room_bytes ? 2 * w->room_bytes : 1 << 17;
        w->bytes = got(realloc(w->bytes, w->room_bytes));
    }
    memcpy(w->bytes + w->n_bytes, s, length);
    w->words[w->n++] = (Word){hash, count, w->n_bytes, length};
    w->slots[at] = w->n;
    w->n_bytes += length;
}

// Count the words of a text into w. spans: (start, end, id) of each special token, which parts words and is none.
void count_words(Words *w, const Rule *rule, const uint8_t *text, int64_t n, const int64_t *spans, int64_t n_spans) {
    const uint8_t *s = text;
    for (int64_t k = 0; k <= n_spans; k++) {
        const uint8_t *end = text + (k < n_spans ? spans[3 * k] : n);
        for (const uint8_t *next; s < end; s = next) {
            next = word_end(rule, s, end);
            add_word(w, s, next - s, 1);
        }
        if (k < n_spans) s = text + spans[3 * k + 1];
    }
}

void add_words(Words *w, const Words *more) {
    for (int64_t i = 0; i < more->n; i++)
        add_word(w, more->bytes + more->words[i].start, more->words[i].length, more->words[i].count);
}

void free_words(Words *w) {
    free(w->words), free(w->bytes), free(w->slots);
    memset(w, 0, sizeof *w);
}

// --- learning merges ---
// All distinct words lie end to end, -1 between them. A token is written at its first and its last byte: the token
// after the one at p starts at p + its length, and what stands before p is the end of the token before. A pair comes
// into being at one moment, when the later of its two tokens is made, so its places are listed once. From then on it
// only gets rarer, so a heap of counts that may be too high is enough: the top is counted again when it is reached.

typedef struct { int64_t count, places; int32_t a, b, n; } Pair;      // `n` places from that number of the list on

typedef struct {
    int32_t *symbols, *word_of, *list;                   // by byte: token, number of its word; places of all pairs
    const Word *words;
    const uint8_t **bytes;                               // of each token: its bytes and how many
    int32_t *lengths;
    Pair *heap;
    int64_t n_list, n_heap, room;
} Trainer;

static int compare(const Trainer *t, int a, int b) {     // as byte strings
    int n = t->lengths[a] < t->lengths[b] ? t->lengths[a] : t->lengths[b], order = memcmp(t->bytes[a], t->bytes[b], n);
    return order ? order : t->lengths[a] - t->lengths[b];
}

static int before(const Trainer *t, const Pair *x, const Pair *y) {   // more frequent, or else the greater pair
    if (x->count != y->count) return x->count > y->count;
    int order = compare(t, x->a, y->a);
    return order ? order > 0 : compare(t, x->b, y->b) > 0;
}

static void push(Trainer *t, Pair pair) {
    if (t->n_heap == t->room) {
        t->room = t->room ? 2 * t->room : 1 << 16;
        t->heap = got(realloc(t->heap, t->room * sizeof(Pair)));
    }
    int64_t i = t->n_heap++;
    for (; i && before(t, &pair, &t->heap[(i - 1) / 2]); i = (i - 1) / 2) t->heap[i] = t->heap[(i - 1) / 2];
    t->heap[i] = pair;
}

static Pair pop(Trainer *t) {
    Pair top = t->heap[0], last = t->heap[--t->n_heap];
    int64_t i = 0, child;
    while ((child = 2 * i + 1) < t->n_heap) {
        if (child + 1 < t->n_heap && before(t, &t->heap[child + 1], &t->heap[child])) child++;
        if (!before(t, &t->heap[child], &last)) break;
        t->heap[i] = t->heap[child];
        i = child;
    }
    t->heap[i] = last;
    return top;
}

// Push the pairs that token c makes with its neighbours at these places, or with its right ones alone. groups: a number
// for each token and side, all 0.
static void add_pairs(Trainer *t, int c, const int32_t *places, int n, int only_right, int32_t *groups) {
    Pair *pairs = got(malloc((2 * (int64_t)n + 1) * sizeof(Pair)));
    int n_pairs = 0;
    for (int round = 0; round < 2; round++) {            // count the places of each pair, then list them
        for (int i = 0; i < n; i++)
            for (int right = only_right; right < 2; right++) {
                int p = places[i], x = t->symbols[right ? p + t->lengths[c] : p - 1];
                if (x < 0 || (x == c && !right)) continue;            // c c is seen once, from its left
                int32_t *group = groups + 2 * x + right;
                if (!*group) {
                    pairs[n_pairs] = (Pair){0, 0, right ? c : x, right ? x : c, 0};
                    *group = ++n_pairs;
                }
                Pair *pair = pairs + *group - 1;
                if (round) t->list[pair->places + pair->n] = right ? p : p - t->lengths[x];
                else pair->count += t->words[t->word_of[p]].count;
                pair->n++;
            }
        for (int k = 0; !round && k < n_pairs; k++) {
            pairs[k].places = t->n_list;
            t->n_list += pairs[k].n;
            pairs[k].n = 0;
        }
    }
    for (int k = 0; k < n_pairs; k++) {
        push(t, pairs[k]);
        groups[2 * (pairs[k].a == c ? pairs[k].b : pairs[k].a) + (pairs[k].a == c)] = 0;
    }
    free(pairs);
}

// Up to n_merges merges: for each its tokens a, b and how often they were neighbours. Returns how many there are.
int64_t learn(const Words *w, int64_t n_merges, int32_t *merges, int64_t *how_often) {
    int64_t n = w->n + w->n_bytes + 1, made = 0, at = 1;
    // A merge lists two places and ends a token, so there are at most 3 n places.
    Trainer t = {got(malloc(n * 4)), got(malloc(n * 4)), got(malloc(3 * n * 4)), w->words,
                 got(malloc((256 + n_merges) * sizeof *t.bytes)), got(malloc((256 + n_merges) * 4)), NULL, 0, 0, 0};
    int32_t *groups = got(calloc(2 * (256 + n_merges), 4)), *first = got(malloc(n * 4));
    static uint8_t single[256];
    for (int i = 0; i < 256; i++) single[i] = i, t.bytes[i] = single + i, t.lengths[i] = 1;
    t.symbols[0] = -1;
    for (int64_t i = 0; i < w->n; i++) {
        for (int k = 0; k < w->words[i].length; k++, at++)
            t.symbols[at] = w->bytes[w->words[i].start + k], t.word_of[at] = i;
        t.symbols[at++] = -1;
    }
    // The pairs of bytes: for each byte c the places that it has, and its right neighbours there.
    int64_t starts[257] = {0};
    for (int64_t p = 1; p < n; p++) if (t.symbols[p] >= 0) starts[t.symbols[p] + 1]++;
    for (int c = 0; c < 256; c++) starts[c + 1] += starts[c];
    for (int64_t p = 1; p < n; p++) if (t.symbols[p] >= 0) first[starts[t.symbols[p]]++] = p;
    for (int c = 0; c < 256; c++) {
        int64_t from = c ? starts[c - 1] : 0;
        add_pairs(&t, c, first + from, starts[c] - from, 1, groups);
    }
    free(first);
    while (made < n_merges && t.n_heap) {
        Pair top = pop(&t);
        int32_t *places = t.list + top.places, kept = 0;
        int64_t now = 0;
        for (int i = 0; i < top.n; i++) {
            int p = places[i];
            if (t.symbols[p] != top.a || t.symbols[p + t.lengths[top.a]] != top.b) continue;
            places[kept++] = p;
            now += w->words[t.word_of[p]].count;
        }
        top.n = kept;
        if (now < top.count) {
            top.count = now;
            if (now) push(&t, top);
            continue;
        }
        int c = 256 + made, done = 0, length = t.lengths[top.a];
        t.lengths[c] = length + t.lengths[top.b];
        merges[2 * made] = top.a, merges[2 * made + 1] = top.b, how_often[made++] = now;
        for (int i = 0; i < kept; i++) {                 // from the left, so that "aaa" becomes aa a
            int p = places[i];
            if (t.symbols[p] != top.a || t.symbols[p + length] != top.b) continue;
            t.symbols[p + length] = -2;                  // nothing starts here any more
            t.symbols[p] = t.symbols[p + t.lengths[c] - 1] = c;
            places[done++] = p;
        }
        t.bytes[c] = w->bytes + places[0] - 1 - t.word_of[places[0]];    // less a -1 for this and each earlier word
        add_pairs(&t, c, places, done, 0, groups);
    }
    free(t.symbols), free(t.word_of), free(t.list), free(t.bytes), free(t.lengths), free(t.heap), free(groups);
    return made;
}

// --- merging words ---

enum { SHORT = 256, NEVER = INT32_MAX };                 // bytes of a word; the rank of a pair that no merge makes one

typedef struct { uint64_t pair; int32_t rank, unused; } Slot;

typedef struct {
    Slot *slots;                                         // a hash table, by the two ids
    int64_t mask;                                        // how many slots, less one
    int32_t *byte_pairs;                                 // (256, 256): the rank of each pair of bytes
    const int32_t *byte_ids, *products;                  // the id of each byte, and of each merge's result
} Merges;

static inline Slot *slot_of(const Merges *m, int32_t a, int32_t b) {   // where the pair stands, or would
    uint64_t pair = (uint64_t)a << 32 | (uint32_t)b, at = (pair * 0x9e3779b97f4a7c15u >> 32) & m->mask;
    while (m->slots[at].pair != pair && m->slots[at].rank != NEVER) at = (at + 1) & m->mask;
    return m->slots + at;
}

static inline int32_t rank_of(const Merges *m, int32_t a, int32_t b) {
    return slot_of(m, a, b)->rank;
}

// The table of merges for a mask and free slots: pairs (n, 2) in the order learnt.
void fill(Merges *m, const int32_t *pairs, int n) {
    for (int64_t i = 0; i <= m->mask; i++) m->slots[i].rank = NEVER;
    for (int i = 0; i < n; i++) {
        Slot *slot = slot_of(m, pairs[2 * i], pairs[2 * i + 1]);
        *slot = (Slot){(uint64_t)pairs[2 * i] << 32 | (uint32_t)pairs[2 * i + 1], i, 0};
    }
    for (int i = 0; i < 65536; i++) m->byte_pairs[i] = rank_of(m, m->byte_ids[i >> 8], m->byte_ids[i & 255]);
}

static void set_leaf(int32_t *tree, int64_t i, int32_t rank) {
    for (tree[i] = rank; i >>= 1;) tree[i] = tree[2 * i] < tree[2 * i + 1] ? tree[2 * i] : tree[2 * i + 1];
}

// Merge n ids in O(n log n). Each leaf of a tree is the rank of the pair that starts there, each node its least leaf.
static int64_t merge_long(const Merges *m, int32_t *ids, int64_t n) {
    int64_t size = 1, kept = 0;
    while (size < n) size *= 2;
    int32_t *tree = got(malloc(2 * size * 4)), *before = got(malloc(n * 4)), *after = got(malloc(n * 4));
    for (int64_t i = 0; i < size; i++) tree[size + i] = i + 1 < n ? rank_of(m, ids[i], ids[i + 1]) : NEVER;
    for (int64_t i = size - 1; i; i--) tree[i] = tree[2 * i] < tree[2 * i + 1] ? tree[2 * i] : tree[2 * i + 1];
    for (int64_t i = 0; i < n; i++) before[i] = i - 1, after[i] = i + 1;
    while (tree[1] != NEVER) {
        int64_t i = 1;
        while (i < size) i = 2 * i + (tree[2 * i] != tree[i]);
        i -= size;
        int64_t j = after[i], next = after[j];
        ids[i] = m->products[tree[1]], ids[j] = -1;
        after[i] = next;
        set_leaf(tree, size + j, NEVER);
        set_leaf(tree, size + i, next < n ? rank_of(m, ids[i], ids[next]) : NEVER);
        if (next < n) before[next] = i;
        if (i) set_leaf(tree, size + before[i], rank_of(m, ids[before[i]], ids[i]));
    }
    for (int64_t i = 0; i < n; i++)
        if (ids[i] >= 0) ids[kept++] = ids[i];
    free(tree), free(before), free(after);
    return kept;
}

// The ids of a word of n bytes: again and again the leftmost pair of lowest rank, and what stands right of it moves up.
static int64_t merge(const Merges *m, const uint8_t *s, int64_t n, int32_t *ids) {
    int32_t ranks[SHORT];
    for (int64_t i = 0; i < n; i++) ids[i] = m->byte_ids[s[i]];
    if (n > SHORT) return merge_long(m, ids, n);
    for (int i = 0; i + 1 < n; i++) ranks[i] = m->byte_pairs[s[i] << 8 | s[i + 1]];
    while (n > 1) {
        int32_t best = NEVER, i = 0;
        for (int k = 0; k + 1 < n; k++) best = ranks[k] < best ? ranks[k] : best;
        if (best == NEVER) break;
        while (ranks[i] != best) i++;
        n--;
        ids[i] = m->products[best];
        for (int k = i + 1; k < n; k++) ids[k] = ids[k + 1], ranks[k - 1] = ranks[k];
        if (i + 1 < n) ranks[i] = rank_of(m, ids[i], ids[i + 1]);
        if (i) ranks[i - 1] = rank_of(m, ids[i - 1], ids[i]);
    }
    return n;
}

// Most words of a text were met before: a slot for each hash keeps the ids of the short word that was there last.
enum { KEPT = 1 << 14, KEPT_BYTES = 31, KEPT_IDS = 7 };

typedef struct { uint64_t key[4]; int32_t n, ids[KEPT_IDS]; } Kept;          // key: the word, its length last

static int64_t look_up(const Merges *m, Kept *kept, const uint8_t *s, int64_t n, int32_t *ids) {
    static const uint8_t ones[64] = {[0 ... 31] = 255};
    static const uint64_t odd[4] = {0x9e3779b97f4a7c15u, 0xc2b2ae3d27d4eb4fu, 0x165667b19e3779f9u, 0xd6e8feb86659fd93u};
    uint64_t key[4], mask[4], hash = 0, different = 0;
    memcpy(key, s, 32), memcpy(mask, ones + 32 - n, 32);
    for (int i = 0; i < 4; i++) key[i] &= mask[i];
    key[3] |= (uint64_t)n << 56;
    for (int i = 0; i < 4; i++) hash ^= key[i] * odd[i];
    Kept *k = kept + (hash >> 32) % KEPT;
    for (int i = 0; i < 4; i++) different |= key[i] ^ k->key[i];
    if (different) {
        int64_t made = merge(m, s, n, ids);
        if (made <= KEPT_IDS) {
            memcpy(k->key, key, sizeof key), memcpy(k->ids, ids, made * sizeof *ids);
            k->n = made;
        }
        return made;
    }
    memcpy(ids, k->ids, sizeof k->ids);
    return k->n;
}

// The ids of a text into `out`, which has room for one a byte and eight more; returns how many. spans: as above.
int64_t encode(const Merges *m, const Rule *rule, const uint8_t *text, int64_t n, const int64_t *spans,
               int64_t n_spans, int32_t *out) {
    Kept *kept = n > 4096 ? calloc(KEPT, sizeof(Kept)) : NULL;
    const uint8_t *s = text;
    int64_t made = 0;
    for (int64_t k = 0; k <= n_spans; k++) {
        const uint8_t *end = text + (k < n_spans ? spans[3 * k] : n);
        for (const uint8_t *next; s < end; s = next) {
            next = word_end(rule, s, end);
            int known = kept && next - s <= KEPT_BYTES && s + 32 <= text + n;
            made += known ? look_up(m, kept, s, next - s, out + made) : merge(m, s, next - s, out + made);
        }
        if (k < n_spans) {
            out[made++] = spans[3 * k + 2];
            s = text + spans[3 * k + 1];
        }
    }
    free(kept);
    return made;
}
