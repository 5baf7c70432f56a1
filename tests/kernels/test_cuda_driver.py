"""The driver calls, recorded by a small stand-in for libcuda: arguments and structures must arrive as
cuda.h has them."""

import ctypes as c
import shutil
import subprocess

import pytest

from dit_accel_kernels.cuda_driver import BFLOAT16, Driver, DriverError

STAND_IN = r"""
#include <stdint.h>
#include <string.h>
typedef struct {
  unsigned gx,gy,gz,bx,by,bz,sh;
  void* stream;
  void* attrs;
  unsigned n;
  } Cfg;
 
uint64_t seen[64];
  int fail=0;
 
int cuInit(unsigned f){
 return 0;
 }
int cuGetErrorName(int s,const char**n){
 *n="CUDA_ERROR_INVALID_VALUE";
 return 0;
 }
int cuDeviceGet(int*d,int o){
 *d=o;
 return 0;
 } int cuDevicePrimaryCtxRetain(void**c,int d){
 *c=(void*)0x77;
 seen[25]++;
 return 0;
 }
int cuCtxSetCurrent(void*c){
 seen[0]=(uint64_t)c;
 return 0;
 }
int cuModuleLoadData(void**m,const void*i){
 *m=(void*)0x55;
 return memcmp(i,"cubin",5);
 }
int cuModuleGetFunction(void**f,void*m,const char*n){
 *f=(void*)(0x1234567890ull);
 return strcmp(n,"kernel")||m!=(void*)0x55;
 }
int cuFuncSetAttribute(void*f,int a,int v){
 seen[1]=(uint64_t)f;
 seen[2]=a;
 seen[3]=v;
 return 0;
 }
int cuLaunchKernelEx(const Cfg*c,void*f,void**p,void**e){
 seen[4]=c->gx;
 seen[5]=c->bx;
 seen[6]=c->sh;
 seen[7]=(uint64_t)c->stream;
 seen[8]=c->n;
 seen[9]=(uint64_t)f;
 seen[10]=*(int*)p[0];
 seen[11]=(uint64_t)c->attrs;
 return fail;
 }
int cuTensorMapEncodeTiled(void*m,int t,uint32_t r,void*a,const uint64_t*d,
  const uint64_t*s,const uint32_t*b,const uint32_t*es,int il,int sw,int l2,int oob){
 seen[12]=(uint64_t)m%64;
 seen[13]=t;
 seen[14]=r;
 seen[15]=(uint64_t)a;
 seen[16]=d[3];
 seen[17]=s[2];
 seen[18]=b[1];
 seen[19]=es[3];
 seen[20]=il;
 seen[21]=sw;
 seen[22]=l2;
 seen[23]=oob;
 memset(m,7,128);
 seen[24]++;
 return fail;
 }
"""
MAP = (BFLOAT16, 0x7F0000001000, (128, 300, 8, 2), (2048, 256, 614400), (64, 128, 1, 1))


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    if shutil.which("cc") is None:
        pytest.skip("no C compiler for the stand-in")
    folder = tmp_path_factory.mktemp("libcuda")
    (folder / "cuda.c").write_text(STAND_IN)
    subprocess.run(["cc", "-shared", "-fPIC", "-o", folder / "cuda.so", folder / "cuda.c"], check=True)
    return c.CDLL(str(folder / "cuda.so"))


@pytest.fixture
def seen(library):
    c.c_int.in_dll(library, "fail").value = 0
    return (c.c_uint64 * 64).in_dll(library, "seen")


def test_a_launch_arrives_as_given(library, seen):
    driver = Driver(library)
    driver.use_device(0)
    function = driver.load_function(b"cubin", "kernel", 231000)
    driver.launch(function, 132, 384, 231000, 0xDEADBEEF00, [c.c_int(42)])
    assert seen[0] == 0x77 and list(seen[1:4]) == [0x1234567890, 8, 231000]
    assert list(seen[4:12]) == [132, 384, 231000, 0xDEADBEEF00, 0, 0x1234567890, 42, 0]


def test_a_tensor_map_arrives_as_given_and_once(library, seen):
    driver = Driver(library)
    before = seen[24]
    found = driver.tensor_map(*MAP)
    assert driver.tensor_map(*MAP) is found and seen[24] == before + 1
    assert list(seen[12:24]) == [0, BFLOAT16, 4, 0x7F0000001000, 2, 614400, 128, 1, 0, 3, 3, 0]
    assert found.opaque[15] == 0x0707070707070707


def test_a_failure_has_the_drivers_name_for_it(library, seen):
    c.c_int.in_dll(library, "fail").value = 1
    with pytest.raises(DriverError, match=r"cuLaunchKernelEx: CUDA_ERROR_INVALID_VALUE \(1\)"):
        Driver(library).launch(None, 1, 1, 0, 0, [c.c_int(1)])


def test_a_context_is_retained_once(library, seen):
    before = seen[25]
    driver = Driver(library)
    driver.use_device(0), driver.use_device(0)
    assert seen[25] == before + 1 and seen[0] == 0x77
