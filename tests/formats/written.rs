//! What is written comes back, here and in PyTorch.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;

use masque::formats::{self, Checkpoint, FileDtype, FileTensor, Value, write_pth, write_safetensors};

use crate::build::fixtures;

/// A folder for this test's files, removed at the end.
struct Scratch(PathBuf);

impl Scratch {
    fn folder(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("masque-formats-{}-{name}", std::process::id()));
        std::fs::create_dir_all(&path).unwrap();
        Self(path)
    }

    fn file(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn one_of_each() -> Vec<(String, FileTensor)> {
    let bytes = |dtype: FileDtype, shape: &[usize]| {
        let len = shape.iter().product::<usize>() * dtype.size();
        FileTensor::from_bytes(dtype, shape, (0..len).map(|i| (i % 2) as u8).collect()).unwrap()
    };
    let mut tensors: Vec<(String, FileTensor)> =
        FileDtype::ALL.into_iter().rev().map(|dtype| (format!("of_{dtype}"), bytes(dtype, &[3, 5]))).collect();
    tensors.push(("scalar".into(), FileTensor::from_f32(&[2.5], &[]).unwrap()));
    tensors.push(("empty".into(), bytes(FileDtype::F32, &[0, 4])));
    tensors.push(("\u{fc}nic\"ode".into(), FileTensor::from_f64(&[f64::NAN, -0.0], &[2]).unwrap()));
    tensors
}

fn assert_same(got: &[(String, FileTensor)], want: &[(String, FileTensor)]) {
    assert!(got.iter().map(|(name, _)| name).eq(want.iter().map(|(name, _)| name)));
    for ((name, got), (_, want)) in got.iter().zip(want) {
        assert_eq!((got.dtype(), got.shape(), got.bytes()), (want.dtype(), want.shape(), want.bytes()), "{name}");
    }
}

#[test]
fn safetensors_come_back_in_the_given_order_with_their_metadata() {
    let scratch = Scratch::folder("safetensors");
    let path = scratch.file("x.safetensors");
    let tensors = one_of_each();
    let metadata = BTreeMap::from([("case".to_string(), "{\"a\": 1}".to_string())]);
    for _ in 0..2 {
        write_safetensors(&path, tensors.iter().map(|(name, tensor)| (name.as_str(), tensor)), &metadata).unwrap();
        let file = formats::open(&path).unwrap();
        assert_same(file.tensors(), &tensors);
        assert_eq!(file.metadata(), &metadata);
    }
    assert_eq!(std::fs::read_dir(&scratch.0).unwrap().count(), 1, "no temporary file is left");
}

#[test]
fn a_failed_write_leaves_the_old_file_and_no_other() {
    let scratch = Scratch::folder("failed");
    let path = scratch.file("x.pth");
    std::fs::write(&path, b"old").unwrap();
    let unwritable = Value::dict([("x", Value::from(FileTensor::from_bytes(FileDtype::U32, &[1], vec![0; 4]).unwrap()))]);
    let error = write_pth(&path, &unwritable).unwrap_err().chain();
    assert!(error.contains("x.pth") && error.contains("U32"), "{error}");
    let twice = FileTensor::from_f32(&[1.0], &[1]).unwrap();
    assert!(write_safetensors(&path, [("a", &twice), ("a", &twice)], &BTreeMap::new()).is_err());
    assert!(write_safetensors(scratch.file("no/such/folder"), [("a", &twice)], &BTreeMap::new()).is_err());
    std::fs::create_dir(scratch.file("folder")).unwrap();
    assert!(write_safetensors(scratch.file("folder"), [("a", &twice)], &BTreeMap::new()).is_err());
    assert_eq!(std::fs::read(&path).unwrap(), b"old");
    assert_eq!(std::fs::read_dir(&scratch.0).unwrap().count(), 2);
}

fn training_checkpoint() -> Value {
    let tensors = one_of_each().into_iter().filter(|(_, tensor)| tensor.dtype() != FileDtype::U32);
    let mut model: Vec<(String, Value)> = tensors.map(|(name, tensor)| (name, tensor.into())).collect();
    let tied = FileTensor::from_f32(&[1.0, 2.0, 3.0, 4.0], &[2, 2]).unwrap();
    model.push(("tied_a".into(), tied.clone().into()));
    model.push(("tied_b".into(), tied.into()));
    let exp_avg = Value::from(FileTensor::from_f32(&[0.5], &[1]).unwrap());
    let state = Value::Dict(vec![(Value::Int(0), Value::dict([("step", Value::Int(3)), ("exp_avg", exp_avg)]))]);
    let betas = Value::Tuple(vec![0.9.into(), 0.95.into()]);
    let group = Value::dict([("lr", 1e-3.into()), ("betas", betas), ("params", Value::List(vec![0.into()]))]);
    let args = serde_json::json!({"a": 1, "b": -70000, "c": 1i64 << 40, "d": 0.5, "e": null, "f": true, "g": "x", "h": [1, 2], "i": {}});
    Value::dict([
        ("model", Value::dict(model)),
        ("optimizer", Value::dict([("state", state), ("param_groups", Value::List(vec![group]))])),
        ("epoch", Value::Int(7)),
        ("args", Value::from_json(&args).unwrap()),
    ])
}

#[test]
fn a_checkpoint_comes_back_with_everything_in_it() {
    let scratch = Scratch::folder("pth");
    let path = scratch.file("x.pth");
    let tree = training_checkpoint();
    write_pth(&path, &tree).unwrap();
    let back = Checkpoint::open(&path).unwrap();
    let mut tensors = one_of_each();
    tensors.retain(|(_, tensor)| tensor.dtype() != FileDtype::U32);
    let model = back.state_dict().unwrap();
    assert_same(&model[..tensors.len()], &tensors);
    assert_eq!(back.tied().unwrap(), [["tied_a", "tied_b"]]);
    assert_eq!(back.top_level_keys(), ["model", "optimizer", "epoch", "args"]);
    assert_eq!(back.epoch().unwrap(), Some(7));
    assert_eq!(back.args().unwrap(), Some(tree.get("args").unwrap().to_json_map().unwrap()));
    assert_eq!(serde_json::json!(back.param_groups().unwrap()), serde_json::json!([{"lr": 1e-3, "betas": [0.9, 0.95], "params": [0]}]));
    let state = back.optimizer_state().unwrap();
    assert_eq!((state[0].0, state[0].1[0].0.as_str(), state[0].1[0].1.to_i64().unwrap()), (0, "step", vec![3]));
    assert!(back.scaler().unwrap().is_none());
    assert_eq!(std::fs::read_dir(&scratch.0).unwrap().count(), 1, "no temporary file is left");
}

#[test]
fn every_public_checkpoint_can_be_written_again_and_reads_the_same() {
    let scratch = Scratch::folder("again");
    for name in ["pth_mae_zip", "pth_mae_legacy", "pth_odd_tensors_zip", "pth_handmade_ok"] {
        let first = Checkpoint::open(fixtures().join(format!("{name}.pth"))).unwrap();
        let path = scratch.file(name);
        write_pth(&path, first.root()).unwrap();
        let second = Checkpoint::open(&path).unwrap();
        assert_same(&second.state_dict().unwrap(), &first.state_dict().unwrap());
        assert_eq!(second.args().unwrap(), first.args().unwrap());
        assert_eq!(second.param_groups().unwrap(), first.param_groups().unwrap());
    }
}

#[test]
fn numbers_convert_between_dtypes_and_refuse_what_they_cannot_hold() {
    let tensor = |dtype, bytes: Vec<u8>| FileTensor::from_bytes(dtype, &[bytes.len() / dtype.size()], bytes).unwrap();
    assert_eq!(tensor(FileDtype::BF16, vec![0x80, 0x3f, 0x20, 0xc0]).to_f32().unwrap(), [1.0, -2.5]);
    assert_eq!(tensor(FileDtype::F16, vec![0x00, 0x3c, 0x00, 0xc1]).to_f64().unwrap(), [1.0, -2.5]);
    assert_eq!(tensor(FileDtype::I8, vec![0xff, 0x7f]).to_f32().unwrap(), [-1.0, 127.0]);
    assert_eq!(tensor(FileDtype::U32, vec![0xff; 4]).to_i64().unwrap(), [4294967295]);
    assert_eq!(tensor(FileDtype::Bool, vec![0, 1]).to_i64().unwrap(), [0, 1]);
    assert!(tensor(FileDtype::Bool, vec![0, 1]).to_f32().is_err());
    let floats = |x: &[f64]| FileTensor::from_f64(x, &[x.len()]).unwrap();
    assert_eq!(floats(&[3.0, -4.0]).to_i64().unwrap(), [3, -4]);
    for wrong in [0.5, f64::NAN, f64::INFINITY, 9.3e18] {
        assert!(floats(&[1.0, wrong]).to_i64().is_err());
    }
    assert!(FileTensor::from_f32(&[1.0], &[2]).is_err());
    assert!(FileTensor::from_bytes(FileDtype::F32, &[usize::MAX, 2], vec![]).is_err());
}

fn python_with_torch() -> Option<String> {
    let python = std::env::var("MASQUE_TORCH_PYTHON").ok();
    if python.is_none() {
        println!("skipped: MASQUE_TORCH_PYTHON names no Python with torch");
    }
    python
}

fn run(python: &str, script: &str, path: &Path) {
    let output = Command::new(python).arg("-c").arg(script).arg(path).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

#[test]
fn pytorch_loads_what_is_written_with_weights_only() {
    let Some(python) = python_with_torch() else { return };
    let scratch = Scratch::folder("torch");
    let path = scratch.file("x.pth");
    write_pth(&path, &training_checkpoint()).unwrap();
    let script = "
import sys, torch
c = torch.load(sys.argv[1], weights_only=True)
m = c['model']
assert list(c) == ['model', 'optimizer', 'epoch', 'args'] and c['epoch'] == 7
assert c['args'] == {'a': 1, 'b': -70000, 'c': 1 << 40, 'd': .5, 'e': None, 'f': True, 'g': 'x', 'h': [1, 2], 'i': {}}
assert c['optimizer']['param_groups'] == [{'lr': 1e-3, 'betas': (.9, .95), 'params': [0]}]
assert c['optimizer']['state'][0]['step'] == 3 and c['optimizer']['state'][0]['exp_avg'].item() == .5
assert m['tied_a'].data_ptr() == m['tied_b'].data_ptr() and m['tied_b'].tolist() == [[1, 2], [3, 4]]
assert m['scalar'].shape == () and m['scalar'].item() == 2.5 and m['empty'].shape == (0, 4)
dtypes = dict(F64='float64', F32='float32', F16='float16', BF16='bfloat16', I64='int64', I32='int32', I16='int16', I8='int8', U8='uint8')
for name, dtype in list(dtypes.items()) + [('BOOL', 'bool')]:
    t = m['of_' + name]
    assert t.dtype == getattr(torch, dtype) and t.shape == (3, 5)
    assert bytes(t.contiguous().view(torch.uint8).flatten().tolist()) == bytes(i % 2 for i in range(15 * t.element_size()))
c = torch.load(sys.argv[1], weights_only=True, mmap=True)
";
    run(&python, script, &path);
}

#[test]
fn files_that_pytorch_has_just_written_load_exactly_or_are_refused() {
    let Some(python) = python_with_torch() else { return };
    let scratch = Scratch::folder("fresh");
    let script = "
import argparse, collections, pathlib, sys, numpy, torch
from safetensors.torch import save_file
torch.manual_seed(0)
out = pathlib.Path(sys.argv[1])
net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.Linear(300, 200, bias=False))
opt = torch.optim.AdamW(net.parameters(), lr=1e-3)
for p in net.parameters(): p.grad = torch.randn_like(p)
opt.step()
model = net.state_dict()
base = torch.randn(12, 10)
model['bf16'], model['half_t'] = base.bfloat16(), base.half().t()
model['view'], model['same'], model['wide'] = base[3:, 2:7], base, base[0, :1].expand(50, 4)
model['chan'] = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
model['ints'], model['flags'], model['none'] = torch.arange(-5, 5, dtype=torch.int16)[::3], base > 0, torch.zeros(3, 0)
args = argparse.Namespace(lr=1e-3, betas=(.9, .95), name='x', nested={'a': [1, None]}, big=1 << 62)
save_file({k: v.contiguous().clone() for k, v in model.items()}, out / 'expected.safetensors')
whole = {'model': model, 'optimizer': opt.state_dict(), 'epoch': 3, 'args': args}
torch.save(whole, out / 'ok_zip.pth')
torch.save(whole, out / 'ok_legacy.pth', _use_new_zipfile_serialization=False)
torch.save(whole, out / 'ok_zip_p4.pth', pickle_protocol=4)
torch.save(whole, out / 'ok_zip_p5.pth', pickle_protocol=5)
torch.save(whole, out / 'ok_legacy_p4.pth', pickle_protocol=4, _use_new_zipfile_serialization=False)
torch.save({'module.' + k: torch.nn.Parameter(v) if v.dtype.is_floating_point else v for k, v in model.items()}, out / 'ok_bare.pth')
torch.save({'model': model, 'acc': numpy.float64(1.5)}, out / 'numpy_scalar.pth')
torch.save({'model': model, 'acc': numpy.zeros(3)}, out / 'numpy_array.pth')
torch.save({'model': model, 'args': argparse.Namespace(p=pathlib.Path('/x'))}, out / 'pathlib.pth')
torch.save({'model': model, 'd': torch.float32}, out / 'dtype.pth')
torch.save({'c': torch.zeros(2, dtype=torch.complex64)}, out / 'complex.pth')
torch.save({'c': torch.zeros(2, dtype=torch.uint16)}, out / 'uint16.pth')
torch.save({'c': torch.zeros(2, 2).to_sparse()}, out / 'sparse.pth')
torch.save(net, out / 'module.pth')
";
    run(&python, script, &scratch.0);
    let expected = formats::open(scratch.file("expected.safetensors")).unwrap();
    for file in ["ok_zip", "ok_legacy", "ok_zip_p4", "ok_zip_p5", "ok_legacy_p4", "ok_bare"] {
        let checkpoint = Checkpoint::open(scratch.file(&format!("{file}.pth"))).unwrap_or_else(|error| panic!("{}", error.chain()));
        let model = checkpoint.state_dict().unwrap();
        assert_eq!(model.len(), expected.tensors().len());
        for (name, got) in model {
            let want = expected.get(&name).unwrap();
            assert_eq!((got.dtype(), got.shape(), got.bytes()), (want.dtype(), want.shape(), want.bytes()), "{file} {name}");
        }
        if file != "ok_bare" {
            assert_eq!(checkpoint.epoch().unwrap(), Some(3));
            let args = serde_json::json!({"lr": 1e-3, "betas": [0.9, 0.95], "name": "x", "nested": {"a": [1, null]}, "big": 1i64 << 62});
            assert_eq!(serde_json::Value::from(checkpoint.args().unwrap().unwrap()), args);
            assert_eq!(checkpoint.optimizer_state().unwrap().len(), 5);
        }
    }
    for (file, named) in [
        ("numpy_scalar", "multiarray.scalar"),
        ("numpy_array", "multiarray._reconstruct"),
        ("pathlib", "pathlib"),
        ("dtype", "torch.float32"),
        ("complex", "torch.ComplexFloatStorage"),
        ("uint16", "torch"),
        ("sparse", "torch._utils._rebuild_sparse_tensor"),
        ("module", "torch.nn.modules.container.Sequential"),
    ] {
        let error = Checkpoint::open(scratch.file(&format!("{file}.pth"))).unwrap_err().chain();
        assert!(error.contains(&format!("{file}.pth")) && error.contains(named) && error.contains("nothing was executed"), "{error}");
    }
}
