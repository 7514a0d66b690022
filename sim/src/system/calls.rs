//! The functions of the C library through which a program reaches the machine, defined in this
//! program, so that the linker prefers them. Each asks whether the calling thread is that of a
//! simulation; if not, or for a real descriptor, the kernel is called as the C library would.

use std::{
    ffi::{c_char, c_int, c_long, c_uint, c_ulong, c_void},
    io::Write as _,
    net::{Ipv4Addr, SocketAddrV4},
    ptr, slice,
};

use libc::{epoll_event, iovec, sockaddr, socklen_t, timespec};

use super::{fill_random, host, is_active, monotonic_ns, now_ns, park, wall_ns, with_network};
use crate::network::{FD_MIN, Fd, Network};

/// Refers to every function, so that the linker keeps them together with the simulation.
pub(super) fn keep() {
    let functions: [*const (); 6] = [
        clock_gettime as *const (),
        getrandom as *const (),
        syscall as *const (),
        pthread_create as *const (),
        epoll_wait as *const (),
        socket as *const (),
    ];
    std::hint::black_box(functions);
}

/// Ends the process: what was called cannot be simulated, and a run that did it would not replay.
fn refuse(what: &str) -> ! {
    // The simulated descriptors do not matter any more, and nothing here may allocate much.
    drop(writeln!(std::io::stderr(), "the simulation ends: {what} was called, which has no simulated counterpart"));
    std::process::abort()
}

#[cfg(target_arch = "x86_64")]
unsafe fn kernel(number: c_long, arguments: [c_long; 6]) -> c_long {
    let [a, b, c, d, e, f] = arguments;
    let result: c_long;
    // SAFETY: this is the system call convention of the platform; the caller answers for the call itself.
    unsafe {
        std::arch::asm!(
            "syscall",
            inlateout("rax") number => result,
            in("rdi") a, in("rsi") b, in("rdx") c, in("r10") d, in("r8") e, in("r9") f,
            lateout("rcx") _, lateout("r11") _,
            options(nostack),
        );
    }
    result
}

#[cfg(target_arch = "aarch64")]
unsafe fn kernel(number: c_long, arguments: [c_long; 6]) -> c_long {
    let [a, b, c, d, e, f] = arguments;
    let result: c_long;
    // SAFETY: this is the system call convention of the platform; the caller answers for the call itself.
    unsafe {
        std::arch::asm!(
            "svc 0",
            in("x8") number,
            inlateout("x0") a => result,
            in("x1") b, in("x2") c, in("x3") d, in("x4") e, in("x5") f,
            options(nostack),
        );
    }
    result
}

fn fail(errno: c_int) -> c_int {
    // SAFETY: the C library gives each thread its own.
    unsafe { *libc::__errno_location() = errno };
    -1
}

/// The result of a call of the kernel, as the C library gives it.
fn settle(result: c_long) -> c_long {
    if (-4_095..0).contains(&result) { c_long::from(fail(-result as c_int)) } else { result }
}

macro_rules! kernel {
    ($number:expr $(, $argument:expr)* $(,)?) => {{
        let given: &[c_long] = &[$($argument as c_long),*];
        let mut arguments = [0; 6];
        arguments[..given.len()].copy_from_slice(given);
        // SAFETY: passed on as the caller of the C library's function has given it.
        settle(unsafe { kernel($number, arguments) })
    }};
}

/// Whether a descriptor is that of a simulated socket.
fn is_ours(fd: c_int) -> bool {
    fd >= FD_MIN && is_active()
}

/// An answer of the network as the C library gives it.
fn answer(result: Result<usize, c_int>) -> isize {
    result.map_or_else(|errno| fail(errno) as isize, |value| value as isize)
}

fn on_network(work: impl FnOnce(&mut Network) -> Result<usize, c_int>) -> c_int {
    answer(with_network(work)) as c_int
}

unsafe fn read_address(address: *const sockaddr) -> Option<SocketAddrV4> {
    // SAFETY: the caller of `bind` or `connect` gives an address whose family says how long it is.
    let (family, address) = unsafe { ((*address).sa_family, address.cast::<libc::sockaddr_in>()) };
    if c_int::from(family) != libc::AF_INET {
        return None;
    }
    // SAFETY: as above, for the family of IPv4.
    let address = unsafe { ptr::read_unaligned(address) };
    let ip = Ipv4Addr::from(address.sin_addr.s_addr.to_ne_bytes());
    Some(SocketAddrV4::new(ip, u16::from_be(address.sin_port)))
}

unsafe fn write_address(from: SocketAddrV4, address: *mut sockaddr, size: *mut socklen_t) {
    if address.is_null() || size.is_null() {
        return;
    }
    let raw = libc::sockaddr_in {
        sin_family: libc::AF_INET as libc::sa_family_t,
        sin_port: from.port().to_be(),
        sin_addr: libc::in_addr { s_addr: u32::from_ne_bytes(from.ip().octets()) },
        sin_zero: [0; 8],
    };
    // SAFETY: the caller gives `*size` bytes of room, and no more of them are written.
    unsafe {
        let room = (*size as usize).min(size_of_val(&raw));
        ptr::copy_nonoverlapping((&raw const raw).cast::<u8>(), address.cast::<u8>(), room);
        *size = size_of_val(&raw) as socklen_t;
    }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn clock_gettime(clock: libc::clockid_t, time: *mut timespec) -> c_int {
    let ns = match clock {
        libc::CLOCK_REALTIME | libc::CLOCK_REALTIME_COARSE if is_active() => wall_ns(),
        libc::CLOCK_MONOTONIC | libc::CLOCK_MONOTONIC_RAW | libc::CLOCK_MONOTONIC_COARSE | libc::CLOCK_BOOTTIME
            if is_active() =>
        {
            monotonic_ns()
        }
        _ => return kernel!(libc::SYS_clock_gettime, clock, time) as c_int,
    };
    // SAFETY: the caller gives room for a time.
    unsafe { *time = timespec { tv_sec: (ns / 1_000_000_000) as i64, tv_nsec: (ns % 1_000_000_000) as i64 } };
    0
}

#[unsafe(no_mangle)]
unsafe extern "C" fn getrandom(buffer: *mut c_void, size: usize, flags: c_uint) -> isize {
    if !is_active() {
        return kernel!(libc::SYS_getrandom, buffer, size, flags) as isize;
    }
    if size > 0 {
        // SAFETY: the caller gives `size` bytes of room.
        fill_random(unsafe { slice::from_raw_parts_mut(buffer.cast(), size) });
    }
    size as isize
}

/// Takes its arguments by number and not as a variadic function: both pass them in the same registers.
#[unsafe(no_mangle)]
unsafe extern "C" fn syscall(
    number: c_long,
    a: c_long,
    b: c_long,
    c: c_long,
    d: c_long,
    e: c_long,
    f: c_long,
) -> c_long {
    if number == libc::SYS_getrandom && is_active() {
        // SAFETY: as for `getrandom`.
        return unsafe { getrandom(a as *mut c_void, b as usize, c as c_uint) as c_long };
    }
    kernel!(number, a, b, c, d, e, f)
}

type Start = extern "C" fn(*mut c_void) -> *mut c_void;

#[unsafe(no_mangle)]
unsafe extern "C" fn pthread_create(
    thread: *mut libc::pthread_t,
    attributes: *const libc::pthread_attr_t,
    start: Start,
    argument: *mut c_void,
) -> c_int {
    if is_active() {
        refuse("pthread_create");
    }
    type Create = unsafe extern "C" fn(*mut libc::pthread_t, *const libc::pthread_attr_t, Start, *mut c_void) -> c_int;
    // SAFETY: the next definition of this name is the C library's, of this very type.
    unsafe {
        let next = libc::dlsym(libc::RTLD_NEXT, c"pthread_create".as_ptr());
        assert!(!next.is_null(), "the C library has threads");
        std::mem::transmute::<*mut c_void, Create>(next)(thread, attributes, start, argument)
    }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn nanosleep(pause: *const timespec, left: *mut timespec) -> c_int {
    if is_active() {
        refuse("nanosleep");
    }
    kernel!(libc::SYS_nanosleep, pause, left) as c_int
}

#[unsafe(no_mangle)]
unsafe extern "C" fn clock_nanosleep(
    clock: libc::clockid_t,
    flags: c_int,
    pause: *const timespec,
    left: *mut timespec,
) -> c_int {
    if is_active() {
        refuse("clock_nanosleep");
    }
    // SAFETY: passed on as it was given. The result is an error number and not -1.
    unsafe {
        -kernel(libc::SYS_clock_nanosleep, [clock as c_long, flags as c_long, pause as c_long, left as c_long, 0, 0])
            as c_int
    }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn getaddrinfo(
    node: *const c_char,
    service: *const c_char,
    hints: *const c_void,
    result: *mut *mut c_void,
) -> c_int {
    if is_active() {
        refuse("getaddrinfo");
    }
    type Resolve = unsafe extern "C" fn(*const c_char, *const c_char, *const c_void, *mut *mut c_void) -> c_int;
    // SAFETY: the next definition of this name is the C library's, of this very type.
    unsafe {
        let next = libc::dlsym(libc::RTLD_NEXT, c"getaddrinfo".as_ptr());
        assert!(!next.is_null(), "the C library resolves names");
        std::mem::transmute::<*mut c_void, Resolve>(next)(node, service, hints, result)
    }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn epoll_wait(epoll: c_int, events: *mut epoll_event, count_max: c_int, timeout_ms: c_int) -> c_int {
    let real = |timeout_ms: c_int| {
        kernel!(libc::SYS_epoll_pwait, epoll, events, count_max, timeout_ms, ptr::null::<c_void>(), 8) as c_int
    };
    if !is_active() {
        return real(timeout_ms);
    }
    let ready = with_network(|network| network.take_ready(host(), count_max as usize));
    if !ready.is_empty() {
        for (number, (flags, token)) in ready.iter().enumerate() {
            // SAFETY: the caller gives room for `count_max` events.
            unsafe { events.add(number).write_unaligned(epoll_event { events: *flags, u64: *token }) };
        }
        return ready.len() as c_int;
    }
    // Wakers of the runtimes are real descriptors.
    let woken = real(0);
    if woken == 0 && timeout_ms != 0 {
        park(u64::try_from(timeout_ms).ok().map(|ms| now_ns() + ms * 1_000_000));
    }
    woken
}

#[unsafe(no_mangle)]
unsafe extern "C" fn epoll_ctl(epoll: c_int, operation: c_int, fd: Fd, event: *mut epoll_event) -> c_int {
    if !is_ours(fd) {
        return kernel!(libc::SYS_epoll_ctl, epoll, operation, fd, event) as c_int;
    }
    if operation == libc::EPOLL_CTL_DEL {
        return on_network(|network| network.unwatch(fd));
    }
    // SAFETY: the caller gives an event with all other operations.
    let epoll_event { events, u64: token } = unsafe { ptr::read_unaligned(event) };
    on_network(|network| network.watch(fd, events, token))
}

#[unsafe(no_mangle)]
unsafe extern "C" fn socket(domain: c_int, kind: c_int, protocol: c_int) -> c_int {
    if !is_active() || domain == libc::AF_UNIX {
        return kernel!(libc::SYS_socket, domain, kind, protocol) as c_int;
    }
    if domain != libc::AF_INET || kind & 0xf != libc::SOCK_STREAM {
        refuse("socket, of another kind than TCP on IPv4,");
    }
    on_network(|network| network.socket(host()))
}

#[unsafe(no_mangle)]
unsafe extern "C" fn bind(fd: Fd, address: *const sockaddr, size: socklen_t) -> c_int {
    if !is_ours(fd) {
        return kernel!(libc::SYS_bind, fd, address, size) as c_int;
    }
    // SAFETY: the caller gives an address.
    let Some(address) = (unsafe { read_address(address) }) else { return fail(libc::EAFNOSUPPORT) };
    on_network(|network| network.bind(fd, address))
}

#[unsafe(no_mangle)]
unsafe extern "C" fn listen(fd: Fd, backlog: c_int) -> c_int {
    if !is_ours(fd) {
        return kernel!(libc::SYS_listen, fd, backlog) as c_int;
    }
    on_network(|network| network.listen(fd))
}

#[unsafe(no_mangle)]
unsafe extern "C" fn connect(fd: Fd, address: *const sockaddr, size: socklen_t) -> c_int {
    if !is_ours(fd) {
        return kernel!(libc::SYS_connect, fd, address, size) as c_int;
    }
    // SAFETY: the caller gives an address.
    let Some(address) = (unsafe { read_address(address) }) else { return fail(libc::EAFNOSUPPORT) };
    on_network(|network| network.connect(fd, address))
}

#[unsafe(no_mangle)]
unsafe extern "C" fn accept4(fd: Fd, address: *mut sockaddr, size: *mut socklen_t, flags: c_int) -> c_int {
    if !is_ours(fd) {
        return kernel!(libc::SYS_accept4, fd, address, size, flags) as c_int;
    }
    match with_network(|network| network.accept(fd)) {
        Ok((accepted, from)) => {
            // SAFETY: the caller gives room for an address, or none.
            unsafe { write_address(from, address, size) };
            accepted
        }
        Err(errno) => fail(errno),
    }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn getsockname(fd: Fd, address: *mut sockaddr, size: *mut socklen_t) -> c_int {
    if !is_ours(fd) {
        return kernel!(libc::SYS_getsockname, fd, address, size) as c_int;
    }
    give_address(with_network(|network| network.own_address(fd)), address, size)
}

fn give_address(found: Result<SocketAddrV4, c_int>, address: *mut sockaddr, size: *mut socklen_t) -> c_int {
    match found {
        Ok(found) => {
            // SAFETY: the callers of the two functions that end here give room for an address.
            unsafe { write_address(found, address, size) };
            0
        }
        Err(errno) => fail(errno),
    }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn getpeername(fd: Fd, address: *mut sockaddr, size: *mut socklen_t) -> c_int {
    if !is_ours(fd) {
        return kernel!(libc::SYS_getpeername, fd, address, size) as c_int;
    }
    give_address(with_network(|network| network.peer_address(fd)), address, size)
}

#[unsafe(no_mangle)]
unsafe extern "C" fn setsockopt(fd: Fd, level: c_int, name: c_int, value: *const c_void, size: socklen_t) -> c_int {
    if !is_ours(fd) {
        return kernel!(libc::SYS_setsockopt, fd, level, name, value, size) as c_int;
    }
    // Sizes of buffers, delays of small packets and signs of life make no difference here.
    0
}

#[unsafe(no_mangle)]
unsafe extern "C" fn getsockopt(fd: Fd, level: c_int, name: c_int, value: *mut c_void, size: *mut socklen_t) -> c_int {
    if !is_ours(fd) {
        return kernel!(libc::SYS_getsockopt, fd, level, name, value, size) as c_int;
    }
    let is_error = level == libc::SOL_SOCKET && name == libc::SO_ERROR;
    let found = if is_error { with_network(|network| network.take_error(fd)) } else { 0 };
    // SAFETY: options of sockets that are asked for here are integers.
    unsafe {
        *value.cast::<c_int>() = found;
        *size = size_of::<c_int>() as socklen_t;
    }
    0
}

#[unsafe(no_mangle)]
unsafe extern "C" fn shutdown(fd: Fd, how: c_int) -> c_int {
    if !is_ours(fd) {
        return kernel!(libc::SYS_shutdown, fd, how) as c_int;
    }
    on_network(|network| if how == libc::SHUT_RD { Ok(0) } else { network.end_writes(fd) })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn close(fd: Fd) -> c_int {
    if !is_ours(fd) {
        return kernel!(libc::SYS_close, fd) as c_int;
    }
    on_network(|network| network.close(fd))
}

unsafe fn receive(fd: Fd, parts: &[(*mut c_void, usize)], flags: c_int) -> isize {
    let peeks = flags & libc::MSG_PEEK != 0;
    let mut received = 0;
    for (buffer, size) in parts.iter().filter(|(_, size)| *size > 0) {
        // SAFETY: the caller gives `size` bytes of room.
        let room = unsafe { slice::from_raw_parts_mut(buffer.cast::<u8>(), *size) };
        match with_network(|network| network.receive(fd, room, peeks)) {
            Ok(0) => break,
            Ok(count) => received += count as isize,
            Err(_) if received > 0 => break,
            Err(errno) => return fail(errno) as isize,
        }
    }
    received
}

unsafe fn transmit(fd: Fd, parts: &[(*mut c_void, usize)]) -> isize {
    let mut bytes = Vec::new();
    for (buffer, size) in parts.iter().filter(|(_, size)| *size > 0) {
        // SAFETY: the caller gives `size` bytes.
        bytes.extend_from_slice(unsafe { slice::from_raw_parts(buffer.cast::<u8>(), *size) });
    }
    answer(with_network(|network| network.send(fd, bytes)))
}

unsafe fn pieces(vector: *const iovec, count: c_int) -> Vec<(*mut c_void, usize)> {
    // SAFETY: the caller gives `count` pieces.
    let pieces = unsafe { slice::from_raw_parts(vector, count.max(0) as usize) };
    pieces.iter().map(|piece| (piece.iov_base, piece.iov_len)).collect()
}

#[unsafe(no_mangle)]
unsafe extern "C" fn recv(fd: Fd, buffer: *mut c_void, size: usize, flags: c_int) -> isize {
    if !is_ours(fd) {
        return kernel!(libc::SYS_recvfrom, fd, buffer, size, flags, 0, 0) as isize;
    }
    // SAFETY: as the caller has given it.
    unsafe { receive(fd, &[(buffer, size)], flags) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn read(fd: Fd, buffer: *mut c_void, size: usize) -> isize {
    if !is_ours(fd) {
        return kernel!(libc::SYS_read, fd, buffer, size) as isize;
    }
    // SAFETY: as the caller has given it.
    unsafe { receive(fd, &[(buffer, size)], 0) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn readv(fd: Fd, vector: *const iovec, count: c_int) -> isize {
    if !is_ours(fd) {
        return kernel!(libc::SYS_readv, fd, vector, count) as isize;
    }
    // SAFETY: as the caller has given it.
    unsafe { receive(fd, &pieces(vector, count), 0) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn send(fd: Fd, buffer: *const c_void, size: usize, flags: c_int) -> isize {
    if !is_ours(fd) {
        return kernel!(libc::SYS_sendto, fd, buffer, size, flags, 0, 0) as isize;
    }
    // SAFETY: as the caller has given it; it is only read.
    unsafe { transmit(fd, &[(buffer.cast_mut(), size)]) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn write(fd: Fd, buffer: *const c_void, size: usize) -> isize {
    if !is_ours(fd) {
        return kernel!(libc::SYS_write, fd, buffer, size) as isize;
    }
    // SAFETY: as the caller has given it; it is only read.
    unsafe { transmit(fd, &[(buffer.cast_mut(), size)]) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn writev(fd: Fd, vector: *const iovec, count: c_int) -> isize {
    if !is_ours(fd) {
        return kernel!(libc::SYS_writev, fd, vector, count) as isize;
    }
    // SAFETY: as the caller has given it.
    unsafe { transmit(fd, &pieces(vector, count)) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn sendmsg(fd: Fd, message: *const libc::msghdr, flags: c_int) -> isize {
    if !is_ours(fd) {
        return kernel!(libc::SYS_sendmsg, fd, message, flags) as isize;
    }
    // SAFETY: as the caller has given it.
    unsafe { transmit(fd, &pieces((*message).msg_iov, (*message).msg_iovlen as c_int)) }
}

/// Takes its argument by number and not as a variadic function: both pass it in the same register.
#[unsafe(no_mangle)]
unsafe extern "C" fn fcntl(fd: Fd, command: c_int, argument: c_long) -> c_int {
    if !is_ours(fd) {
        return kernel!(libc::SYS_fcntl, fd, command, argument) as c_int;
    }
    match command {
        libc::F_GETFL => libc::O_RDWR | libc::O_NONBLOCK,
        libc::F_GETFD => libc::FD_CLOEXEC,
        libc::F_SETFL | libc::F_SETFD => 0,
        _ => refuse("fcntl, with a command other than for flags,"),
    }
}

/// As for [`fcntl`].
#[unsafe(no_mangle)]
unsafe extern "C" fn ioctl(fd: Fd, request: c_ulong, argument: c_long) -> c_int {
    if !is_ours(fd) {
        return kernel!(libc::SYS_ioctl, fd, request, argument) as c_int;
    }
    if request == libc::FIONBIO as c_ulong { 0 } else { refuse("ioctl, with another request than to not block,") }
}
