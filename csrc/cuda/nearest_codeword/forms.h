// Forms of the half-precision search that give the same results. A compiler's -DUNICODE_FAST_NAME=0 chooses the former
// one, kept until a GPU has timed both; docs/performance.md has their instruction counts.
#pragma once

// keep_candidates: a warp looks for candidates only in groups of columns whose minimum is low enough, and a thread that
// has found one stores it directly. 0: it goes through all scores twice.
#ifndef UNICODE_FAST_SKIP_GROUPS
#define UNICODE_FAST_SKIP_GROUPS 1
#endif

// codeword_kernel: codewords equal to one of lower index take no part in the search. 0: they are candidates together.
#ifndef UNICODE_FAST_EXCLUDE_DUPLICATES
#define UNICODE_FAST_EXCLUDE_DUPLICATES 1
#endif

// load_rows: reads rows of up to 256 columns once and computes in float32. 0: reads them twice and computes in float64.
#ifndef UNICODE_FAST_READ_ROWS_ONCE
#define UNICODE_FAST_READ_ROWS_ONCE 1
#endif

// finish_kernel: rows with more candidates than a list holds are scored again, and compared with the candidates alone.
// 0: they are compared with all codewords in float64.
#ifndef UNICODE_FAST_SEARCH_AGAIN
#define UNICODE_FAST_SEARCH_AGAIN 1
#endif

// The search with wgmma: a block does several tiles of rows and prepares the next one meanwhile, where
// plan_nearest_codeword finds enough codewords and make_persistent allows. 0: a block for each tile of rows.
#ifndef UNICODE_FAST_PERSISTENT_GRID
#define UNICODE_FAST_PERSISTENT_GRID 1
#endif

// keep_candidates: the lowest bits of a score hold its place among the thread's scores, so the minimum names its
// codeword. Off: it takes more instructions, and ptxas serialises its products. 0: the place is that of a bit.
#ifndef UNICODE_FAST_BRANCH_FREE_MINIMUM
#define UNICODE_FAST_BRANCH_FREE_MINIMUM 0
#endif

// codeword_kernel: one codeword of a tight cluster takes part in the search for all, whose differences from it decide.
// 0: all of them are candidates. Needs the second search, which compares them.
#ifndef UNICODE_FAST_FIND_CLUSTERS
#define UNICODE_FAST_FIND_CLUSTERS 1
#endif

namespace unicode_fast::cuda {

constexpr bool kSkipGroups = UNICODE_FAST_SKIP_GROUPS;
constexpr bool kExcludeDuplicates = UNICODE_FAST_EXCLUDE_DUPLICATES;
constexpr bool kReadRowsOnce = UNICODE_FAST_READ_ROWS_ONCE;
constexpr bool kSearchAgain = UNICODE_FAST_SEARCH_AGAIN;
constexpr bool kPersistentGrid = UNICODE_FAST_PERSISTENT_GRID;
constexpr bool kBranchFreeMinimum = UNICODE_FAST_BRANCH_FREE_MINIMUM;
constexpr bool kFindClusters = UNICODE_FAST_FIND_CLUSTERS && kSearchAgain;

}  // namespace unicode_fast::cuda
