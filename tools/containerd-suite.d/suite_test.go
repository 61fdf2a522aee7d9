// containerd's conformance suite for snapshotters, against `vellum snapshotter` as containerd
// reaches it: over its socket, through containerd's own proxy. Built and run by
// tools/containerd-suite.
package suite

import (
	"context"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"google.golang.org/grpc"
)

// How long a daemon may take to answer, and to end.
const patience = 60 * time.Second

func TestVellum(t *testing.T) {
	program := os.Getenv("VELLUM_BIN")
	if program == "" {
		t.Fatal("VELLUM_BIN names no program: run tools/containerd-suite")
	}
	runSuite(t, "vellum", func(_ context.Context, root string) (snapshotter, func() error, error) {
		d, err := start(program, root)
		if err != nil {
			return nil, nil, err
		}
		return d.client, d.end, nil
	})
}

// A daemon of one test, and the connection to it.
type daemon struct {
	command *exec.Cmd
	socket  string
	conn    *grpc.ClientConn
	client  snapshotter
	// Receives how the process ended.
	ended chan error
}

// Starts a daemon on a store below root, which the suite made for one test.
func start(program, root string) (*daemon, error) {
	// Beside the store: the suite puts a directory of each test into os.TempDir().
	d := &daemon{socket: filepath.Join(filepath.Dir(root), "sock"), ended: make(chan error, 1)}
	d.command = exec.Command(program, "--root", root, "snapshotter", "--address", d.socket)
	d.command.Stdout, d.command.Stderr = os.Stderr, os.Stderr
	if err := d.command.Start(); err != nil {
		return nil, err
	}
	go func() { d.ended <- d.command.Wait() }()
	err := d.connect()
	if err != nil {
		d.command.Process.Kill()
		return nil, err
	}
	return d, nil
}

func (d *daemon) connect() error {
	for deadline := time.Now().Add(patience); ; time.Sleep(10 * time.Millisecond) {
		probe, err := net.Dial("unix", d.socket)
		if err == nil {
			probe.Close()
			break
		}
		select {
		case ended := <-d.ended:
			return fmt.Errorf("the daemon ended before it answered: %v", ended)
		default:
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("the daemon does not answer: %w", err)
		}
	}
	conn, err := grpc.Dial("unix://"+d.socket, grpc.WithInsecure())
	if err != nil {
		return err
	}
	d.conn, d.client = conn, newClient(conn, "vellum")
	return nil
}

// Removes what the test left, since the suite deletes the directory next, and ends the daemon,
// which must succeed in that.
func (d *daemon) end() error {
	left := d.removeAll()
	d.conn.Close()
	if err := d.command.Process.Signal(syscall.SIGTERM); err != nil {
		return err
	}
	select {
	case err := <-d.ended:
		if err != nil {
			return fmt.Errorf("the daemon's end at SIGTERM: %w", err)
		}
	case <-time.After(patience):
		d.command.Process.Kill()
		return fmt.Errorf("the daemon does not end at SIGTERM")
	}
	return left
}

// Removes all snapshots: in each round those without children.
func (d *daemon) removeAll() error {
	ctx := withNamespace(context.Background(), "testsuite")
	for {
		keys, err := d.keys(ctx)
		if err != nil || len(keys) == 0 {
			return err
		}
		var removed int
		var last error
		for _, key := range keys {
			if err := d.client.Remove(ctx, key); err != nil {
				last = err
			} else {
				removed++
			}
		}
		if removed == 0 {
			return fmt.Errorf("cannot remove %s: %w", strings.Join(keys, ", "), last)
		}
	}
}
