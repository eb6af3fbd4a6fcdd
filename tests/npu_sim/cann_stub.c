/* A CANN runtime with no NPU behind it: enough of its entry points for torch_npu to import and to own "device" memory,
 * which is host memory. Everything else reports success. Arithmetic happens above the dispatcher, in Python; what
 * only the runtime sees (graph capture, replay, synchronisation, device-side waits) is handed to Python through `hook`,
 * whose non-zero return is the error code torch_npu gets, with the text of npu_sim_error(). */
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define OK(name) int name(void) { return 0; }
#include "cann_noops.h"
#undef OK

enum { CAPTURE_BEGIN, CAPTURE_END, REPLAY, DESTROY, GROUP_BEGIN, GROUP_END, UPDATE_BEGIN, UPDATE_END, VALUE_WAIT,
       VALUE_WRITE, SYNCHRONIZE, IS_DONE };
typedef int (*hook_t)(int kind, uint64_t object, uint64_t stream, uint64_t value, uint64_t flag);
static hook_t hook;
static char error_text[4096];

void npu_sim_set_hook(hook_t h) { hook = h; }
void npu_sim_error(const char *text) { strncpy(error_text, text, sizeof error_text - 1); }
const char *aclGetRecentErrMsg(void) { return error_text; }

#define U(x) ((uint64_t)(uintptr_t)(x))
/* torch_npu's launch thread (TASK_QUEUE_ENABLE=1) must not wait for the interpreter, which may be waiting for it: what it
 * calls is kept here, in order, until a thread of the interpreter takes it. */
#define MAX_KEPT 65536
typedef struct { uint64_t kind, object, stream, value, flag; } call_t;
static call_t kept[MAX_KEPT];
static unsigned first_kept, next_kept;
static pthread_mutex_t kept_lock = PTHREAD_MUTEX_INITIALIZER;
static _Thread_local int is_python;
void npu_sim_mark_thread(void) { is_python = 1; }
int npu_sim_take(call_t *out) {
    pthread_mutex_lock(&kept_lock);
    int found = first_kept != next_kept;
    if (found) *out = kept[first_kept++ % MAX_KEPT];
    pthread_mutex_unlock(&kept_lock);
    return found;
}
static int keep(int kind, uint64_t object, uint64_t stream, uint64_t value, uint64_t flag) {
    pthread_mutex_lock(&kept_lock);
    int full = next_kept - first_kept == MAX_KEPT;
    if (!full) kept[next_kept++ % MAX_KEPT] = (call_t){(uint64_t)kind, object, stream, value, flag};
    pthread_mutex_unlock(&kept_lock);
    return full ? 507899 : 0;
}
static int call(int kind, void *object, void *stream, uint64_t value, uint64_t flag) {
    if (!hook) return kind == IS_DONE;
    if (!is_python) return keep(kind, U(object), U(stream), value, flag);
    return hook(kind, U(object), U(stream), value, flag);
}
static int handle(void **h) { return (*h = calloc(1, 64)) ? 0 : 207001; }

/* ---- devices and memory */
static int32_t current_device;
static uint64_t total_bytes = 64ull << 30, used_bytes;

int aclrtGetDeviceCount(uint32_t *count) {
    const char *set = getenv("NPU_SIM_DEVICES");
    *count = set ? (uint32_t)atoi(set) : 1;
    return 0;
}
int aclrtGetDevice(int32_t *device) { *device = current_device; return 0; }
int aclrtSetDevice(int32_t device) { current_device = device; return 0; }
const char *aclrtGetSocName(void) { const char *set = getenv("NPU_SIM_SOC"); return set ? set : "Ascend910B2"; }
int aclrtGetMemInfo(int attr, size_t *free_bytes, size_t *total) {
    *total = total_bytes; *free_bytes = total_bytes - used_bytes; return 0;
}
int aclrtGetCurrentContext(void **c) { static int context; *c = &context; return 0; }

/* A header in front of each block remembers its size. Untouched pages of a large block cost nothing. */
static void *take(size_t n, int on_device) {
    char *p;
    if (posix_memalign((void **)&p, 512, n + 512)) return 0;
    ((uint64_t *)p)[0] = n; ((uint64_t *)p)[1] = (uint64_t)on_device;
    if (on_device) used_bytes += n;
    return p + 512;
}
static void give(void *p) {
    uint64_t *head = (uint64_t *)((char *)p - 512);
    if (head[1]) used_bytes -= head[0];
    free(head);
}
int aclrtMalloc(void **p, size_t n, int policy) {
    if (used_bytes + n > total_bytes) return 207001;
    return (*p = take(n, 1)) ? 0 : 207001;
}
int aclrtMallocAlign32(void **p, size_t n, int policy) { return aclrtMalloc(p, n, policy); }
int aclrtFree(void *p) { give(p); return 0; }
int aclrtMemcpy(void *d, size_t cap, const void *s, size_t n, int kind) { memcpy(d, s, n); return 0; }
int aclrtMemcpyAsync(void *d, size_t cap, const void *s, size_t n, int kind, void *st) { memcpy(d, s, n); return 0; }
int aclrtMemset(void *d, size_t cap, int v, size_t n) { memset(d, v, n); return 0; }
int aclrtMemsetAsync(void *d, size_t cap, int v, size_t n, void *st) { memset(d, v, n); return 0; }

/* Page-locked host blocks are remembered: a copy that does not wait may only read from one. */
#define MAX_PINNED 4096
static struct { char *start; size_t size; } pinned[MAX_PINNED];
int aclrtMallocHost(void **p, size_t n) {
    if (!(*p = take(n, 0))) return 207001;
    for (int i = 0; i < MAX_PINNED; i++)
        if (!pinned[i].start) { pinned[i].start = *p; pinned[i].size = n; return 0; }
    return 207001;
}
int aclrtMallocHostWithCfg(void **p, uint64_t n, void *cfg) { return aclrtMallocHost(p, n); }
int aclrtFreeHost(void *p) {
    for (int i = 0; i < MAX_PINNED; i++) if (pinned[i].start == p) pinned[i].start = 0;
    give(p);
    return 0;
}
int npu_sim_is_pinned(const void *p) {
    for (int i = 0; i < MAX_PINNED; i++)
        if (pinned[i].start && (char *)p >= pinned[i].start && (char *)p < pinned[i].start + pinned[i].size) return 1;
    return 0;
}
/* aclrtPtrAttributes starts with the location: { id, type }, type 0 pinned host, 1 device, 2 unregistered host. */
int aclrtPointerGetAttributes(const void *p, int32_t *attributes) {
    attributes[0] = 0; attributes[1] = npu_sim_is_pinned(p) ? 0 : 2; return 0;
}

/* ---- streams and events */
int aclrtCreateStream(void **s) { return handle(s); }
int aclrtCreateStreamWithConfig(void **s, uint32_t priority, uint32_t flag) { return handle(s); }
int aclrtDestroyStream(void *s) { return 0; }
int aclrtDestroyStreamForce(void *s) { return 0; }
int aclrtStreamGetId(void *s, int32_t *id) { *id = 0; return 0; }
int aclrtStreamQuery(void *s, int *status) { *status = call(IS_DONE, 0, s, 0, 0); return 0; }
int aclrtCreateEventExWithFlag(void **e, uint32_t flag) { return handle(e); }
int aclrtCreateEventWithFlag(void **e, uint32_t flag) { return handle(e); }
int aclrtDestroyEvent(void *e) { return 0; }
int aclrtQueryEventStatus(void *e, int *status) { *status = call(IS_DONE, e, 0, 0, 0); return 0; }
int aclrtEventElapsedTime(float *ms, void *a, void *b) { *ms = 1.0f; return 0; }
int aclrtSynchronizeDevice(void) { return call(SYNCHRONIZE, 0, 0, 0, 0); }
int aclrtSynchronizeDeviceWithTimeout(int t) { return call(SYNCHRONIZE, 0, 0, 0, 0); }
int aclrtSynchronizeStream(void *s) { return call(SYNCHRONIZE, 0, s, 0, 0); }
int aclrtSynchronizeStreamWithTimeout(void *s, int t) { return call(SYNCHRONIZE, 0, s, 0, 0); }
int aclrtSynchronizeEvent(void *e) { return call(SYNCHRONIZE, e, 0, 0, 0); }
int aclrtValueWait(void *a, uint64_t v, uint32_t flag, void *s) { return call(VALUE_WAIT, a, s, v, flag); }
int aclrtValueWrite(void *a, uint64_t v, uint32_t flag, void *s) { return call(VALUE_WRITE, a, s, v, flag); }

/* ---- graph capture: the state torch_npu asks for is kept here, the recording itself in Python */
static void *capturing_stream, *capturing_model;
int aclmdlRICaptureBegin(void *stream, int mode) {
    int code = handle(&capturing_model);
    capturing_stream = stream;
    return code ? code : call(CAPTURE_BEGIN, capturing_model, stream, (uint64_t)mode, 0);
}
int aclmdlRICaptureGetInfo(void *stream, int *status, void **model) {
    int active = capturing_model && stream == capturing_stream;
    *status = active;
    if (model) *model = active ? capturing_model : 0;
    return 0;
}
int aclmdlRICaptureEnd(void *stream, void **model) {
    *model = capturing_model;
    capturing_model = capturing_stream = 0;
    return call(CAPTURE_END, *model, stream, 0, 0);
}
int aclmdlRIExecuteAsync(void *model, void *stream) { return call(REPLAY, model, stream, 0, 0); }
int aclmdlRIDestroy(void *model) { return call(DESTROY, model, 0, 0, 0); }
int aclmdlRICaptureTaskGrpBegin(void *stream) { return call(GROUP_BEGIN, 0, stream, 0, 0); }
int aclmdlRICaptureTaskGrpEnd(void *stream, void **group) {
    int code = handle(group);
    return code ? code : call(GROUP_END, *group, stream, 0, 0);
}
int aclmdlRICaptureTaskUpdateBegin(void *stream, void *group) { return call(UPDATE_BEGIN, group, stream, 0, 0); }
int aclmdlRICaptureTaskUpdateEnd(void *stream) { return call(UPDATE_END, 0, stream, 0, 0); }

/* ---- the rest that needs an answer */
size_t aclGetCompileoptSize(int opt) { return 64; }
int aclGetCompileopt(int opt, char *value, size_t n) { memset(value, 0, n); value[0] = '1'; return 0; }
