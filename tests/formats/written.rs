//! What is written comes back, here and in PyTorch.

use std::collections::BTreeMap;
use std::path::PathBuf;
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

#[test]
fn pytorch_loads_what_is_written_with_weights_only() {
    let Ok(python) = std::env::var("MASQUE_TORCH_PYTHON") else {
        println!("skipped: MASQUE_TORCH_PYTHON names no Python with torch");
        return;
    };
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
    let output = Command::new(python).arg("-c").arg(script).arg(&path).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}
