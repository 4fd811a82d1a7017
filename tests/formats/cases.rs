//! Hostile files: a name, the bytes, and what the error has to mention.

use crate::build::{cat, entry, int, ints, pth, storage, text, view, view_of, with_w, zip};

pub type Hostile = (&'static str, Vec<u8>, &'static str);

const NAMESPACE: &[u8] = b"cargparse\nNamespace\n)\x81";

pub fn pickles() -> Vec<Hostile> {
    let good = view(0, &[4, 3], &[3, 1]);
    let global = |name: &str| with_w(&cat(&[b"c", name.replacen(' ', "\n", 1).as_bytes(), b"\n"]));
    let deep = |open: &[u8], close: &[u8]| with_w(&cat(&[&open.repeat(300_000), b"N", &close.repeat(300_000)]));
    // Thirty lists, each holding the one before twice.
    let laughs: Vec<u8> = (0..30u8).flat_map(|i| [b']', b'q', i + 1, b'(', b'h', i, b'h', i, b'e', b'0']).collect();
    let wide = cat(&[b"](", &b"N".repeat(2000), b"eq\x000](", &b"h\x00".repeat(2000), b"e"]);
    let long_key = cat(&[&text(&"k".repeat(500_000)), b"q\x000](", &b"}h\x00Ns".repeat(100_000), b"e"]);
    let refilled = cat(&[NAMESPACE, b"}q\x01(", &text("a"), b"Nub", &b"h\x01b".repeat(1000)]);
    let cyclic_state = cat(&[NAMESPACE, b"q\x00}", &text("self"), b"h\x00sb"]);
    let views = b"h\x00h\x01R0".repeat(60_000);
    let shared_view =
        cat(&[b"ctorch._utils\n_rebuild_tensor_v2\nq\x00(", &storage("FloatStorage", "0", 12), &int(0), &ints(&[1 << 20]), &ints(&[0])]);
    let bombs = cat(&[&shared_view, b"\x89ccollections\nOrderedDict\n)Rtq\x01", &views, b"R"]);
    let frame = cat(&[b"\x95", &u64::MAX.to_le_bytes()]);
    let protocol_4 = |name: &str| cat(&[b"\x80\x04\x8c\x02os\x94\x8c", &[name.len() as u8], name.as_bytes(), b"\x93."]);
    vec![
        ("os.system", with_w(&cat(&[b"cposix\nsystem\n(", &text("true"), b"tR"])), "posix.system"),
        ("eval", global("builtins eval"), "builtins.eval"),
        ("a global is refused when looked up", cat(&[b"\x80\x02cos\nsystem\n0}."]), "os.system"),
        ("STACK_GLOBAL", protocol_4("system"), "os.system"),
        ("pathlib", global("pathlib PosixPath"), "turn paths into str"),
        ("numpy", global("numpy.core.multiarray scalar"), "turn NumPy values into Python numbers"),
        ("numpy 2", global("numpy._core.multiarray scalar"), "turn NumPy values into Python numbers"),
        ("OrderedDict elsewhere", global("collections.abc OrderedDict"), "collections.abc.OrderedDict"),
        ("dotted name", global("torch _utils._rebuild_tensor"), "torch._utils._rebuild_tensor"),
        ("untyped storage", global("torch.storage UntypedStorage"), "ordinary dtype"),
        ("a very long global", global(&format!("x {}", "y".repeat(100_000))), "..."),
        ("global without end", b"\x80\x02cos".to_vec(), "no end"),
        ("global in bytes that are no text", b"\x80\x02c\xff\xff\nx\n.".to_vec(), "UTF-8"),
        ("calling a string", with_w(&cat(&[&text("x"), b")R"])), "no callable"),
        ("calling a class", with_w(b"cargparse\nNamespace\n)R"), "called as a function"),
        ("calling a storage class", with_w(b"ctorch\nFloatStorage\n)R"), "called as a function"),
        ("OrderedDict with arguments", with_w(b"ccollections\nOrderedDict\n(NtR"), "with arguments"),
        ("arguments that are no tuple", with_w(b"ccollections\nOrderedDict\n]R"), "a tuple is missing"),
        ("making a storage", with_w(b"ctorch\nFloatStorage\n)\x81"), "only argparse.Namespace"),
        ("Namespace with arguments", with_w(b"cargparse\nNamespace\n(Nt\x81"), "without arguments"),
        ("state of a list", with_w(b"]}b"), "given one"),
        ("state of a plain dict", with_w(b"}}b"), "given one"),
        ("state that is no dict", with_w(&cat(&[NAMESPACE, b"]b"])), "not a dict"),
        ("Namespace filled again and again", with_w(&refilled), "filled twice"),
        ("Namespace with a number as a name", with_w(&cat(&[NAMESPACE, b"}K\x01Nsb"])), "as an attribute's name"),
        ("empty", Vec::new(), "wanted"),
        ("no STOP", b"\x80\x02}".to_vec(), "wanted"),
        ("only STOP", b"\x80\x02.".to_vec(), "stack is empty"),
        ("leftovers on the stack", b"\x80\x02N}.".to_vec(), "unfinished"),
        ("an open mark", b"\x80\x02}(.".to_vec(), "stack is empty"),
        ("bytes after STOP", cat(&[&with_w(&good), b"junk"]), "4 bytes follow"),
        ("protocol 9", b"\x80\x09}.".to_vec(), "protocol 9"),
        ("protocol 0 opcodes", b"(dp0\n.".to_vec(), "opcode"),
        ("INST", b"\x80\x02(ios\nsystem\n.".to_vec(), "opcode"),
        ("EXT1", b"\x80\x02\x82\x01.".to_vec(), "opcode"),
        ("text PERSID", b"\x80\x02Pabc\n.".to_vec(), "opcode"),
        ("stack underflow", b"\x80\x02\x87.".to_vec(), "stack is empty"),
        ("underflow across a mark", with_w(b"NN(\x86"), "stack is empty"),
        ("missing mark", with_w(b"Nt"), "mark is missing"),
        ("append to a dict", with_w(b"}Na"), "other than a list"),
        ("append to nothing", b"\x80\x02Na.".to_vec(), "stack is empty"),
        ("set in a list", with_w(b"]NNs"), "other than a dict"),
        ("odd entries", with_w(b"}(NNNu"), "no value"),
        ("empty memo slot", with_w(b"h\x07"), "slot 7 is empty"),
        ("huge memo slot", with_w(b"Nr\xff\xff\xff\xff"), "absurd"),
        ("huge BINUNICODE", with_w(b"X\xff\xff\xff\xffabc"), "wanted"),
        ("huge BINUNICODE8", with_w(b"\x8d\xff\xff\xff\xff\xff\xff\xff\x7fabc"), "wanted"),
        ("huge BINBYTES8", with_w(b"\x8e\xff\xff\xff\xff\xff\xff\xff\xffabc"), "wanted"),
        ("huge LONG4", with_w(b"\x8b\xff\xff\xff\x7fabc"), "wanted"),
        ("negative LONG4", with_w(b"\x8b\xff\xff\xff\xffabc"), "negative length"),
        ("huge FRAME", with_w(&frame), "frame"),
        ("string that is no text", with_w(b"X\x02\0\0\0\xff\xfe"), "UTF-8"),
        ("list as a key", with_w(b"}]Ns"), "cannot be the key"),
        ("tuple with a list as a key", with_w(b"}]\x85Ns"), "cannot be the key"),
        ("the same key twice", with_w(&cat(&[b"}(", &text("k"), b"N", &text("k"), b"Nu"])), "same key twice"),
        ("True and 1 as keys", with_w(b"}(\x88NK\x01Nu"), "same key twice"),
        ("a long key again and again", with_w(&long_key), "key of a dict has 500000 bytes"),
        ("deep lists", deep(b"]", b"a"), "nested"),
        ("deep tuples", deep(b"", b"\x85"), "nested"),
        ("deep dicts", deep(b"}K\x01", b"s"), "nested"),
        ("a list in itself", with_w(b"]q\x00h\x00a"), "nested"),
        (
            "a dict in itself",
            with_w(&cat(&[b"}q\x00(K\x00h\x00", &(1..250u8).flat_map(|i| [b'K', i, b'N']).collect::<Vec<_>>(), b"u"])),
            "nested",
        ),
        ("a Namespace in itself", with_w(&cyclic_state), "nested"),
        ("a list in itself often", with_w(&cat(&[b"]q\x00(", &b"h\x00".repeat(5000), b"e"])), "nested"),
        ("a billion laughs", with_w(&cat(&[b"]q\x00(NNe0", &laughs, b"h\x1e"])), "multiply"),
        ("lists of lists", with_w(&wide), "multiply"),
        ("bare storage", with_w(&storage("FloatStorage", "0", 12)), "a storage stands where"),
        ("persistent id that is no tuple", with_w(b"NQ"), "tuple is missing"),
        ("persistent id too short", with_w(b"(NNtQ"), "storage is not"),
        ("persistent id of something else", with_w(&cat(&[b"(", &text("module"), b"NNNNtQ"])), "is not a storage"),
        (
            "a storage's class is a function",
            with_w(&cat(&[b"(", &text("storage"), b"ccollections\nOrderedDict\n", &text("0"), &text("cpu"), b"K\x0ctQ"])),
            "no storage class",
        ),
        ("negative count", with_w(&view_of(&storage("FloatStorage", "0", -1), 0, &[0], &[1])), "negative"),
        ("count that overflows", with_w(&view_of(&storage("DoubleStorage", "0", i64::MAX), 0, &[1 << 60], &[1])), "should hold"),
        ("count beyond the entry", with_w(&view_of(&storage("FloatStorage", "0", 13), 0, &[13], &[1])), "should hold 13 F32 elements"),
        ("missing storage", with_w(&view_of(&storage("FloatStorage", "1", 12), 0, &[12], &[1])), "storage \"1\" is missing"),
        ("a storage outside the folder", with_w(&view_of(&storage("FloatStorage", "../data.pkl", 1), 0, &[1], &[1])), "is missing"),
        ("long storage key", with_w(&storage("FloatStorage", &"0".repeat(5000), 12)), "5000 bytes"),
        (
            "one storage with two dtypes",
            cat(&[b"\x80\x02](", &good, &view_of(&storage("IntStorage", "0", 12), 0, &[12], &[1]), b"e."]),
            "12 F32 here and 12 I32 there",
        ),
        ("negative offset", with_w(&view(-1, &[4], &[1])), "negative"),
        ("negative size", with_w(&view(0, &[-4], &[1])), "negative"),
        ("negative stride", with_w(&view(11, &[4], &[-1])), "negative"),
        ("offset outside", with_w(&view(12, &[1], &[1])), "leave its storage of 12"),
        ("scalar outside", with_w(&view(12, &[], &[])), "leave its storage of 12"),
        ("shape outside", with_w(&view(1, &[4, 3], &[3, 1])), "leave its storage of 12"),
        ("strides outside", with_w(&view(0, &[4, 3], &[4, 1])), "leave its storage of 12"),
        ("strides that overflow", with_w(&view(0, &[i64::MAX, 3], &[i64::MAX, 1])), "overflow"),
        ("strides that overflow alone", with_w(&view(1, &[3, 1], &[i64::MAX, 1])), "leave its storage"),
        ("a shape that overflows", with_w(&view(0, &[1 << 40, 1 << 40], &[0, 0])), "overflows"),
        ("a shape that overflows in bytes", with_w(&view(0, &[1 << 62], &[0])), "too large"),
        ("expanded beyond reason", with_w(&view(0, &[1 << 40], &[0])), "far more memory than the file"),
        ("expanded a little too far", with_w(&view(0, &[1 << 25], &[0])), "far more memory than the file"),
        ("many expanded tensors", with_w(&bombs), "far more memory than the file"),
        ("more sizes than strides", with_w(&view(0, &[4, 3], &[1])), "2 sizes but 1 strides"),
        ("many dimensions", with_w(&view(0, &[1; 40], &[1; 40])), "40 dimensions"),
        (
            "a size that is a string",
            with_w(&view(0, &[], &[]).iter().flat_map(|&b| if b == b'(' { vec![b'(', b'N'] } else { vec![b] }).collect::<Vec<_>>()),
            "wrong",
        ),
        ("a tensor without storage", with_w(b"ctorch._utils\n_rebuild_tensor_v2\n(NNNNNNtR"), "described wrongly"),
        ("a parameter without tensor", with_w(b"ctorch._utils\n_rebuild_parameter\n(N\x88NtR"), "described wrongly"),
        (
            "a tensor with hooks",
            with_w(&replace(&good, b"ccollections\nOrderedDict\n)R", b"ccollections\nOrderedDict\n)RK\x01Ns")),
            "hooks",
        ),
    ]
}

fn replace(bytes: &[u8], from: &[u8], to: &[u8]) -> Vec<u8> {
    let at = bytes.windows(from.len()).position(|window| window == from).unwrap();
    cat(&[&bytes[..at], to, &bytes[at + from.len()..]])
}

pub fn zips() -> Vec<Hostile> {
    let pickle = || entry("a/data.pkl", &with_w(&view(0, &[12], &[1])));
    let data = || entry("a/data/0", &[0; 48]);
    let good = zip(&[pickle(), data()]);
    let end = good.len() - 22;
    let patched = |at: usize, bytes: &[u8]| {
        let mut file = good.clone();
        file[at..at + bytes.len()].copy_from_slice(bytes);
        file
    };
    let mut many = zip(&[pickle(), data()]);
    let directory = many[end - 46 - 8..end].to_vec();
    many.truncate(end);
    many.extend(directory.repeat(1000));
    let locator = |offset: u64| cat(&[&good[..end], b"PK\x06\x07\0\0\0\0", &offset.to_le_bytes(), &[1, 0, 0, 0], &good[end..]]);
    let with = |change: fn(&mut crate::build::Entry)| {
        let mut changed = data();
        change(&mut changed);
        zip(&[pickle(), changed])
    };
    vec![
        ("no directory", good[..end].to_vec(), "cut short"),
        ("only a magic", b"PK\x03\x04".to_vec(), "cut short"),
        ("trailing bytes", cat(&[&good, b"junk"]), "cut short"),
        ("no data.pkl", zip(&[data()]), "no data.pkl"),
        ("two data.pkl", zip(&[pickle(), entry("b/data.pkl", b"\x80\x02N.")]), "more than one data.pkl"),
        ("the same name twice", zip(&[pickle(), data(), data()]), "twice"),
        ("big-endian", zip(&[pickle(), data(), entry("a/byteorder", b"big")]), "byte order"),
        ("compressed", with(|e| e.method = 8), "compressed (method 8)"),
        ("encrypted", with(|e| e.flags = 1), "encrypted"),
        ("size beyond the file", with(|e| e.size = Some(1 << 30)), "leaves the file"),
        ("zip64 size without its field", with(|e| e.size = Some(u32::MAX)), "lacks its zip64 field"),
        (
            "zip64 size beyond everything",
            with(|e| (e.size, e.extra) = (Some(u32::MAX), cat(&[b"\x01\0\x10\0", &[0xff; 16]]))),
            "leaves the file",
        ),
        (
            "zip64 sizes that differ",
            with(|e| (e.size, e.extra) = (Some(u32::MAX), cat(&[b"\x01\0\x10\0", &48u64.to_le_bytes(), &49u64.to_le_bytes()]))),
            "two sizes",
        ),
        ("extra field cut short", with(|e| (e.size, e.extra) = (Some(u32::MAX), b"\x01\0\xff\0abc".to_vec())), "extra field"),
        ("offset beyond the file", with(|e| e.offset = Some(1 << 30)), "leaves the file"),
        ("offset into another entry", with(|e| e.offset = Some(5)), "no local header"),
        (
            "two entries in one place",
            zip(&[pickle(), data(), {
                let mut same = entry("a/data/0", &[]);
                same.offset = Some(0);
                same
            }]),
            "another local name",
        ),
        ("more entries than said", patched(end + 8, &[1, 0, 1, 0]), "more than its 1 entries"),
        ("fewer entries than said", patched(end + 8, &[0xff, 0xff, 0xff, 0xff]), "cut short"),
        ("several disks", patched(end + 4, &[1, 0]), "several parts"),
        ("directory offset beyond the file", patched(end + 16, &[0xff; 4]), "does not end"),
        ("directory size wrong", patched(end + 12, &[1, 0, 0, 0]), "does not end"),
        (
            "overlapping entries",
            {
                let inner = zip(&[entry("a/data/0", &[0; 48])]);
                let mut local = inner[..30 + 8 + 48].to_vec();
                let mut inside = data();
                let mut outer = entry("a/outer", &local);
                outer.flags = 0;
                inside.offset = Some((30 + "a/data.pkl".len() + pickle().data.len() + 30 + "a/outer".len()) as u32);
                local.clear();
                zip(&[pickle(), outer, inside])
            },
            "overlap",
        ),
        ("zip64 end record nowhere", locator(u64::MAX), "cut short"),
        ("zip64 end record elsewhere", locator(0), "damaged"),
        ("a thousand directory records too many", many, "cut short"),
    ]
}

pub fn legacies() -> Vec<Hostile> {
    let head = |magic: &[u8], protocol: &[u8], little: &[u8]| {
        cat(&[b"\x80\x02\x8a\x0a", magic, b".\x80\x02", protocol, b".\x80\x02}", &text("little_endian"), little, b"s."])
    };
    let magic = b"\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19";
    let good_head = head(magic, b"M\xe9\x03", b"\x88");
    let object = with_w(&view(0, &[12], &[1]));
    let keys = |list: &[&str]| cat(&[b"\x80\x02](", &list.iter().flat_map(|key| text(key)).collect::<Vec<_>>(), b"e."]);
    let held = |count: u64| cat(&[&count.to_le_bytes(), &[0; 48]]);
    let file = |list: &[&str], data: &[u8]| cat(&[&good_head, &object, &keys(list), data]);
    vec![
        ("plain pickle", with_w(b"N"), "legacy header"),
        ("wrong magic", head(b"\x6d\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19", b"M\xe9\x03", b"\x88"), "legacy header"),
        ("wrong protocol", head(magic, b"M\xea\x03", b"\x88"), "legacy header"),
        ("big-endian", head(magic, b"M\xe9\x03", b"\x89"), "little-endian"),
        ("header only", good_head.clone(), "wanted"),
        ("no storages", file(&["0"], &[]), "leaves the file"),
        ("a storage missing from the list", file(&[], &[]), "storage \"0\" is missing"),
        ("an unknown storage", file(&["0", "1"], &held(12)), "belongs to no tensor"),
        ("a storage twice", file(&["0", "0"], &cat(&[&held(12), &held(12)])), "twice"),
        ("huge count", file(&["0"], &held(u64::MAX)), "leaves the file"),
        ("huge count that does not overflow", file(&["0"], &held(1 << 60)), "leaves the file"),
        ("too few elements", file(&["0"], &held(11)[..52]), "should hold 12"),
        ("trailing bytes", file(&["0"], &cat(&[&held(12), b"junk"])), "4 bytes follow"),
        ("a tensor in the list of keys", cat(&[&good_head, &object, &object, &held(12)]), "tensor stands in the header"),
        ("keys that are numbers", cat(&[&good_head, &object, b"\x80\x02](K\x01e.", &held(12)]), "no string"),
    ]
}

pub fn safetensors() -> Vec<Hostile> {
    let file = |header: &str, data: usize| cat(&[&(header.len() as u64).to_le_bytes(), header.as_bytes(), &vec![0; data]]);
    let tensor = |shape: &str, from: u64, to: u64| format!(r#"{{"dtype":"F32","shape":{shape},"data_offsets":[{from},{to}]}}"#);
    let one = |shape: &str, from: u64, to: u64| format!(r#"{{"a":{}}}"#, tensor(shape, from, to));
    let two = |first: &str, second: &str| format!("{{{first},{second}}}");
    let a = |name: &str, from, to| format!(r#""{name}":{}"#, tensor("[2]", from, to));
    let huge = |len: u64| cat(&[&len.to_le_bytes(), b"{}"]);
    vec![
        ("header length of everything", huge(u64::MAX), "header"),
        ("header length beyond the file", huge(1000), "header"),
        ("header length of 99 MB", huge(99_000_000), "header"),
        ("header cut in the middle", file(&one("[2]", 0, 8), 8)[..30].to_vec(), "header"),
        ("no JSON", file("{nothing", 0), "header"),
        ("deep JSON", file(&format!("{{\"a\":{}", "[".repeat(100_000)), 0), "header"),
        ("header that is no text", cat(&[&4u64.to_le_bytes(), b"{\"\xff\xfe"]), "header"),
        ("data beyond the file", file(&one("[2]", 0, 8), 7), "header"),
        ("data before the file's end", file(&one("[2]", 0, 8), 9), "header"),
        ("data that overlaps", file(&two(&a("a", 0, 8), &a("b", 4, 12)), 12), "header"),
        ("data with a hole", file(&two(&a("a", 0, 8), &a("b", 12, 20)), 20), "header"),
        ("offsets in reverse", file(&one("[2]", 8, 0), 8), "header"),
        ("huge offsets", file(&one("[2]", u64::MAX - 8, u64::MAX), 8), "header"),
        ("offset that does not fit", file(&one("[2]", 0, 8).replace('8', "18446744073709551616"), 8), "header"),
        ("negative shape", file(&one("[-2]", 0, 8), 8), "header"),
        ("wrong size", file(&one("[3]", 0, 8), 8), "header"),
        ("shape that overflows", file(&one("[4294967296,4294967296]", 0, 0), 0), "header"),
        ("shape that overflows in bytes", file(&one("[4611686018427387904]", 0, 0), 0), "header"),
        ("unknown dtype", file(&one("[2]", 0, 8).replace("F32", "X7"), 8), "header"),
        ("dtype we do not have", file(&one("[2]", 0, 8).replace("F32", "U64").replace("[2]", "[1]"), 8), "not supported"),
        ("a tensor twice", file(&two(&a("a", 0, 8), &a("a", 0, 8)), 8), "names \"a\" twice"),
        ("a tensor twice, escaped", file(&two(&a("a", 0, 8), &a("\\u0061", 0, 8)), 8), "names \"a\" twice"),
        ("metadata twice", file(r#"{"__metadata__":{"a":"1"},"__metadata__":{}}"#, 0), "header"),
        ("a metadata key twice", file(r#"{"__metadata__":{"a":"1","a":"2"}}"#, 0), "names \"a\" twice"),
        ("a hundred thousand dimensions", file(&one(&format!("[{}1]", "1,".repeat(100_000)), 0, 8), 8), "header"),
    ]
}

/// All of them as whole files.
pub fn all() -> Vec<Hostile> {
    let wrapped = pickles().into_iter().map(|(name, pickle, reason)| (name, pth(&pickle), reason));
    wrapped.chain(zips()).chain(legacies()).chain(safetensors()).collect()
}
