//! Files made to harm: each is a sentence, none a panic, a long wait or a large allocation.

use std::time::{Duration, Instant};

use masque::formats::{self, Bytes, Checkpoint, Value};

use crate::build::{cat, entry, fixtures, pth, text, view, with_w, zip};
use crate::cases;

#[test]
fn every_hostile_file_is_refused_in_a_sentence_that_names_it() {
    let mut wrong = Vec::new();
    for (name, bytes, reason) in cases::all() {
        let start = Instant::now();
        let Err(error) = formats::parse(bytes.into(), "some/file") else {
            wrong.push(format!("{name}: loaded"));
            continue;
        };
        let (error, took) = (error.chain(), start.elapsed());
        let fits = error.contains("some/file") && error.contains(reason) && error.len() < 600 && !error.contains('\n');
        if !fits || took > Duration::from_secs(2) {
            wrong.push(format!("{name} ({took:?}): {error}"));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn what_is_no_checkpoint_at_all_is_refused() {
    for bytes in [&b""[..], b"x", b"PK", b"\x80", b"GIF89a", &[0; 100]] {
        let error = formats::parse(bytes.to_vec().into(), "some/file").unwrap_err().chain();
        assert!(error.contains("some/file"), "{error}");
    }
    for path in ["/no/such/file", "/dev/null", "/"] {
        let error = formats::open(path).unwrap_err().chain();
        assert!(error.contains(path), "{error}");
    }
}

#[test]
fn the_harmless_forms_load() {
    let load = |pickle: &[u8]| Checkpoint::parse(pth(pickle).into(), "some/file").unwrap();
    let loaded = |view: &[u8]| load(&with_w(view)).state_dict().unwrap()[0].1.to_f32().unwrap();
    assert_eq!(loaded(&view(0, &[2, 3], &[1, 2])), [0.0, 2.0, 4.0, 1.0, 3.0, 5.0]);
    assert_eq!(loaded(&view(5, &[3], &[0])), [5.0; 3]);
    assert_eq!(loaded(&view(0, &[3, 2, 2], &[2, 1, 3])), [0.0, 3.0, 1.0, 4.0, 2.0, 5.0, 3.0, 6.0, 4.0, 7.0, 5.0, 8.0]);
    assert_eq!(loaded(&view(7, &[], &[])), [7.0]);
    assert_eq!(loaded(&view(9, &[1, 3], &[i64::MAX, 1])), [9.0, 10.0, 11.0]);
    assert_eq!(loaded(&view(1 << 40, &[1 << 40, 0, 1 << 40], &[1, 1, 1])), [0.0; 0]);
    assert_eq!(loaded(&view(0, &[1 << 20], &[0])).len(), 1 << 20);
    let parameter = cat(&[b"ctorch._utils\n_rebuild_parameter\n(", &view(0, &[2], &[1]), b"\x88ccollections\nOrderedDict\n)RtR"]);
    assert_eq!(loaded(&parameter), [0.0, 1.0]);

    let protocol_4 = cat(&[
        b"\x80\x04\x95\x00\x00\x00\x00\x00\x00\x00\x00}\x94(\x8c\x01a\x94K\x05\x8c\x01b\x94\x8c\x0bcollections\x94\x8c\x0bOrderedDict\x94\x93)R",
        b"\x8c\x01ch\x01\x8c\x01dC\x02xyu.",
    ]);
    let root = load(&protocol_4);
    assert_eq!(root.top_level_keys(), ["a", "b", "c", "d"]);
    assert!(matches!(root.root().get("c"), Some(Value::Str(text)) if &**text == "a"));
    assert!(matches!(root.root().get("d"), Some(Value::Bytes(bytes)) if **bytes == *b"xy"));
    assert!(matches!(root.root().get("a"), Some(Value::Int(5))));
    assert!(matches!(root.root().get("b"), Some(Value::Dict(pairs)) if pairs.is_empty()));

    let storage = [0; 48];
    let legacy_name = zip(&[entry("any name/data.pkl", &with_w(&view(0, &[12], &[1]))), entry("any name/data/0", &storage)]);
    assert!(Checkpoint::parse(legacy_name.into(), "some/file").is_ok());
}

#[test]
fn integers_of_every_length_are_read() {
    for (pickle, want) in [
        (&b"\x8a\x00"[..], "0"),
        (b"\x8a\x01\xff", "-1"),
        (b"\x8a\x02\xff\x00", "255"),
        (b"\x8b\x02\x00\x00\x00\x00\x80", "-32768"),
        (b"\x8a\x09\xff\xff\xff\xff\xff\xff\xff\x7f\x00", "9223372036854775807"),
        (b"\x8a\x09\xff\xff\xff\xff\xff\xff\xff\xff\x00", "18446744073709551615"),
        (b"\x8a\x09\x00\x00\x00\x00\x00\x00\x00\x80\xff", "-9223372036854775808"),
        (b"J\xfe\xff\xff\xff", "-2"),
        (b"M\xff\xff", "65535"),
    ] {
        let root = Checkpoint::parse(pth(&with_w(pickle)).into(), "some/file").unwrap();
        assert_eq!(root.root().get("w").unwrap().to_json().unwrap().to_string(), want);
    }
}

#[test]
fn a_state_dict_is_found_under_its_usual_names_and_without_the_parallel_prefix() {
    let w = view(0, &[2], &[1]);
    let named = |names: &[&str]| cat(&[b"}(", &names.iter().flat_map(|name| cat(&[&text(name), &w])).collect::<Vec<_>>(), b"u"]);
    let under = |key: &str, dict: &[u8]| cat(&[b"\x80\x02}(", &text("epoch"), b"K\x01", &text(key), dict, b"u."]);
    let keys = |pickle: &[u8]| {
        let checkpoint = Checkpoint::parse(pth(pickle).into(), "some/file").unwrap();
        checkpoint.state_dict().map(|tensors| tensors.into_iter().map(|(key, _)| key).collect::<Vec<_>>())
    };
    assert_eq!(keys(&under("model", &named(&["module.a", "module.b"]))).unwrap(), ["a", "b"]);
    assert_eq!(keys(&under("state_dict", &named(&["module.a", "b"]))).unwrap(), ["module.a", "b"]);
    assert_eq!(keys(&cat(&[b"\x80\x02", &named(&["model", "x"]), b"."])).unwrap(), ["model", "x"]);
    let error = keys(&under("weights", &named(&["a"]))).unwrap_err().chain();
    assert!(error.contains("some/file holds no state dict") && error.contains("\"epoch\" is an int"), "{error}");
}

/// Parses, and asks for everything that a checkpoint offers; only that it returns matters.
fn exercise(bytes: Vec<u8>) {
    let bytes = Bytes::from(bytes);
    let _ = formats::parse(bytes.clone(), "some/file");
    if let Ok(checkpoint) = Checkpoint::parse(bytes, "some/file") {
        let _ = (checkpoint.args(), checkpoint.scaler(), checkpoint.epoch(), checkpoint.param_groups());
        let _ = (checkpoint.optimizer_state(), checkpoint.tied(), checkpoint.top_level_keys());
    }
}

fn valid_files() -> Vec<Vec<u8>> {
    let names = [
        "pth_handmade_ok.pth",
        "pth_odd_tensors_zip.pth",
        "pth_mae_zip.pth",
        "pth_mae_legacy.pth",
        "pth_odd_tensors_zip.expected.safetensors",
    ];
    names.iter().map(|name| std::fs::read(fixtures().join(name)).unwrap()).collect()
}

#[test]
fn a_file_cut_short_anywhere_does_not_load() {
    for file in valid_files() {
        let step = 1 + file.len() / 2000;
        for len in (0..file.len()).step_by(step) {
            assert!(formats::parse(file[..len].to_vec().into(), "some/file").is_err(), "{len} of {} bytes", file.len());
        }
    }
}

#[test]
fn a_file_with_any_byte_changed_never_panics() {
    let mut state = 1u64;
    let mut random = move || {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (state >> 33) as u8
    };
    for file in valid_files() {
        let step = 1 + file.len() / 4000;
        for at in (0..file.len()).step_by(step) {
            let mut changed = file.clone();
            changed[at] = random();
            exercise(changed.clone());
            changed[at] = file[at] ^ (1 << (random() % 8));
            exercise(changed);
        }
    }
}

#[test]
fn random_opcodes_never_panic() {
    let opcodes = b"(.01N\x88\x89KMJ\x8aG\x8cXC}])t\x85\x86\x87aesuqr\x94hjcR\x81bQ\x93\x95";
    let mut state = 7u64;
    let mut random = move |below: usize| {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (state >> 33) as usize % below
    };
    let pieces = [
        text("storage"),
        b"ctorch\nFloatStorage\n".to_vec(),
        b"ccollections\nOrderedDict\n)R".to_vec(),
        b"cargparse\nNamespace\n)\x81".to_vec(),
        view(0, &[2, 2], &[1, 1]),
        b"q\x00h\x00".to_vec(),
    ];
    for _ in 0..40_000 {
        let mut pickle = b"\x80\x02".to_vec();
        for _ in 0..random(30) {
            match random(4) {
                0 => pickle.extend(&pieces[random(pieces.len())]),
                _ => pickle.push(opcodes[random(opcodes.len())]),
            }
        }
        pickle.push(b'.');
        exercise(pth(&pickle));
    }
}
